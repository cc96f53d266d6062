"""A Transformer encoder as an expert over sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts.kinds.shapes import require_dims
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from torch import Tensor


class TransformerOptions(StrictModel):
    """Pre-norm encoder blocks over a sequence of shape (steps, features), with learned positions."""

    hidden_size: int = Field(32, ge=1, description="Width of the blocks; rows are projected to it and back.")
    num_heads: int = Field(4, ge=1, description="Attention heads; must divide `hidden_size`.")
    num_layers: int = Field(1, ge=1, le=1024, description="Encoder blocks on top of each other.")
    feed_forward_features: int | None = Field(
        None, ge=1, description="Hidden width of each block's feed-forward; 4 x `hidden_size` when not given."
    )
    out_features: int | None = Field(
        None,
        ge=1,
        description="Width of the output vector, read from the mean over the steps; a sequence of the input's "
        "shape, read from every step, when not given.",
    )

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> TransformerOptions:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {self.hidden_size}, found {self.num_heads}")
        return self


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (https://arxiv.org/abs/2002.04745)."""

    def __init__(self, hidden_size: int, *, num_heads: int, feed_forward_features: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, feed_forward_features)
        self.down = nn.Linear(feed_forward_features, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(num_rows, steps, hidden_size)`` to the same shape."""
        hidden_states = hidden_states + self._attend(self.attention_norm(hidden_states))
        outputs: Tensor = hidden_states + self.down(gelu(self.up(self.feed_forward_norm(hidden_states))))
        return outputs

    def _attend(self, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.query_key_value(hidden_states).chunk(3, dim=-1)
        )
        attended = scaled_dot_product_attention(query, key, value)
        outputs: Tensor = self.attention_out(attended.transpose(1, 2).flatten(2))
        return outputs


class Transformer(nn.Module):
    """Projection, learned positions, encoder blocks, norm, and a linear head."""

    def __init__(self, in_shape: tuple[int, ...], options: TransformerOptions) -> None:
        super().__init__()
        require_dims("transformer", in_shape, ("steps", "features"))
        num_steps, in_features = in_shape
        width = options.hidden_size
        inner = options.feed_forward_features or 4 * width
        self.projection = nn.Linear(in_features, width)
        self.positions = nn.Parameter(torch.randn(num_steps, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(width, num_heads=options.num_heads, feed_forward_features=inner)
                for _ in range(options.num_layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, options.out_features or in_features)
        self.reads_mean = options.out_features is not None
        block_cost = num_steps * width * (4 * width + 2 * inner + 2 * num_steps)
        self.contract = ExpertContract(
            in_shape=in_shape,
            out_shape=in_shape if options.out_features is None else (options.out_features,),
            cost_per_row=num_steps * in_features * width
            + options.num_layers * block_cost
            + width * (options.out_features or num_steps * in_features),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, steps, features)`` to ``(num_rows, out_features)``, or to sequences again."""
        hidden_states = self.norm(self.blocks(self.projection(rows) + self.positions))
        outputs: Tensor = self.head(hidden_states.mean(dim=1) if self.reads_mean else hidden_states)
        return outputs


TRANSFORMER = ExpertKind("transformer", TransformerOptions, Transformer)
