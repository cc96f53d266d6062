"""Experts that compute next to nothing, as in MoE++ (https://arxiv.org/abs/2410.07348)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from moe_runtime.config.strict import StrictModel
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
    """Answers with one learned tensor, whatever the row; zero until it is trained."""

    out_shape: list[Annotated[int, Field(ge=1)]] | None = Field(None, description=_OUT_SHAPE)


class Constant(nn.Module):
    """``value``, a parameter."""

    def __init__(self, in_shape: tuple[int, ...], options: ConstantOptions) -> None:
        super().__init__()
        out_shape = in_shape if options.out_shape is None else tuple(options.out_shape)
        self.value = nn.Parameter(torch.zeros(out_shape))
        self.contract = ExpertContract(in_shape=in_shape, out_shape=out_shape, cost_per_row=prod(out_shape))

    def forward(self, rows: Tensor) -> Tensor:
        """The value once per row, ``(num_rows, *out_shape)``."""
        return self.value.expand(rows.shape[0], *self.contract.out_shape)


IDENTITY = ExpertKind("identity", IdentityOptions, Identity)
ZERO = ExpertKind("zero", ZeroOptions, Zero)
CONSTANT = ExpertKind("constant", ConstantOptions, Constant)
