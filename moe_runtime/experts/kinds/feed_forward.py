"""Feed-forward experts, the kind that most MoE layers are made of."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn
from torch.nn.functional import gelu, relu, silu

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from torch import Tensor


class FeedForwardOptions(StrictModel):
    """Linear, ReLU or GELU, linear, over the last dimension of the item."""

    hidden_features: int = Field(128, ge=1, description="Width of the hidden layer.")
    out_features: int | None = Field(None, ge=1, description="Width of the output; the input's when not given.")
    activation: Literal["relu", "gelu"] = Field("relu", description="Between the two linear layers.")
    bias: bool = Field(True, description="Whether the linear layers have a bias.")


class FeedForward(nn.Module):
    """``down(activation(up(x)))``, as in https://arxiv.org/abs/1706.03762, section 3.3."""

    def __init__(self, in_shape: tuple[int, ...], options: FeedForwardOptions) -> None:
        super().__init__()
        in_features = in_shape[-1]
        out_features = options.out_features or in_features
        self.up = nn.Linear(in_features, options.hidden_features, bias=options.bias)
        self.down = nn.Linear(options.hidden_features, out_features, bias=options.bias)
        self.activation = relu if options.activation == "relu" else gelu
        self.contract = ExpertContract(
            in_shape=in_shape,
            out_shape=(*in_shape[:-1], out_features),
            cost_per_row=prod(in_shape[:-1]) * options.hidden_features * (in_features + out_features),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, ..., out_features)``."""
        outputs: Tensor = self.down(self.activation(self.up(rows)))
        return outputs


class SwiGLUOptions(StrictModel):
    """Gated feed-forward with SiLU and without biases, over the last dimension of the item."""

    hidden_features: int = Field(128, ge=1, description="Width of the hidden layer.")
    out_features: int | None = Field(None, ge=1, description="Width of the output; the input's when not given.")


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, as in https://arxiv.org/abs/2002.05202."""

    def __init__(self, in_shape: tuple[int, ...], options: SwiGLUOptions) -> None:
        super().__init__()
        in_features = in_shape[-1]
        out_features = options.out_features or in_features
        self.gate = nn.Linear(in_features, options.hidden_features, bias=False)
        self.up = nn.Linear(in_features, options.hidden_features, bias=False)
        self.down = nn.Linear(options.hidden_features, out_features, bias=False)
        self.contract = ExpertContract(
            in_shape=in_shape,
            out_shape=(*in_shape[:-1], out_features),
            cost_per_row=prod(in_shape[:-1]) * options.hidden_features * (2 * in_features + out_features),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, *in_shape)`` to ``(num_rows, ..., out_features)``."""
        outputs: Tensor = self.down(silu(self.gate(rows)) * self.up(rows))
        return outputs


FEED_FORWARD = ExpertKind("feed_forward", FeedForwardOptions, FeedForward)
SWIGLU = ExpertKind("swiglu", SwiGLUOptions, SwiGLU)
