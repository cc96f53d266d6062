"""Experts that compute next to nothing, as in MoE++ (https://arxiv.org/abs/2410.07348)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.errors import ConfigError
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from torch import Tensor

_OUT_SHAPE = "Shape of an output row; the input's when not given."


class IdentityOptions(StrictModel):
    """Gives each row back as it is: the token skips the layer."""


class Identity(nn.Module):
    """``x``."""

    def __init__(self, in_shape: tuple[int, ...], _: IdentityOptions) -> None:
        super().__init__()
        self.contract = ExpertContract(in_shape=in_shape, out_shape=in_shape)

    def forward(self, rows: Tensor) -> Tensor:
        """The rows themselves, not a copy."""
        return rows


class ZeroOptions(StrictModel):
    """Answers with zeros: the token is discarded."""

    out_shape: list[Annotated[int, Field(ge=1)]] | None = Field(None, description=_OUT_SHAPE)


class Zero(nn.Module):
    """``0``."""

    def __init__(self, in_shape: tuple[int, ...], options: ZeroOptions) -> None:
        super().__init__()
        out_shape = in_shape if options.out_shape is None else tuple(options.out_shape)
        self.contract = ExpertContract(in_shape=in_shape, out_shape=out_shape)

    def forward(self, rows: Tensor) -> Tensor:
        """Zeros, ``(num_rows, *out_shape)``."""
        return rows.new_zeros((rows.shape[0], *self.contract.out_shape))


class ConstantOptions(StrictModel):
    """Answers with one learned tensor, whatever the row, or with a mixture of both; zero until it is trained."""

    out_shape: list[Annotated[int, Field(ge=1)]] | None = Field(None, description=_OUT_SHAPE)
    mix_input: bool = Field(
        False,
        description="Answers `a1 x + a2 value` with `(a1, a2)` a learned softmax of `x`, as MoE++ does, instead of "
        "`value`.",
    )


class Constant(nn.Module):
    """``value``, a parameter; with ``mix_input`` ``a1 x + a2 value``, where ``(a1, a2) = softmax(mix(x))``."""

    def __init__(self, in_shape: tuple[int, ...], options: ConstantOptions) -> None:
        super().__init__()
        out_shape = in_shape if options.out_shape is None else tuple(options.out_shape)
        if options.mix_input and out_shape != in_shape:
            raise ConfigError(
                f"options.out_shape: with mix_input, expected the input's shape {list(in_shape)}, "
                f"found {list(out_shape)}"
            )
        self.value = nn.Parameter(torch.zeros(out_shape))
        self.mix = nn.Linear(prod(in_shape), 2, bias=False) if options.mix_input else None
        cost_per_row = prod(out_shape) * (4 if options.mix_input else 1)
        self.contract = ExpertContract(in_shape=in_shape, out_shape=out_shape, cost_per_row=cost_per_row)

    def forward(self, rows: Tensor) -> Tensor:
        """The value once per row, or the mixture, ``(num_rows, *out_shape)``."""
        if self.mix is None:
            return self.value.expand(rows.shape[0], *self.contract.out_shape)
        logits = self.mix(rows.flatten(1))
        # float32 or wider, as the gate's.
        shares = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(rows.dtype)
        of_rows, of_value = (share.reshape(-1, *[1] * (rows.dim() - 1)) for share in shares.unbind(dim=1))
        mixed: Tensor = of_rows * rows + of_value * self.value
        return mixed


IDENTITY = ExpertKind("identity", IdentityOptions, Identity)
ZERO = ExpertKind("zero", ZeroOptions, Zero)
CONSTANT = ExpertKind("constant", ConstantOptions, Constant)
