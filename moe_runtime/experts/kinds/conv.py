"""A convolutional expert over images."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.errors import ConfigError
from moe_runtime.experts.kinds.shapes import require_dims
from moe_runtime.experts.protocol import ExpertContract, ExpertKind

if TYPE_CHECKING:
    from torch import Tensor


class ConvOptions(StrictModel):
    """Convolutions with ReLU over an image of shape (channels, height, width), then a linear head."""

    channels: int = Field(16, ge=1, description="Channels that each convolution gives.")
    kernel_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [3, 3],
        min_length=1,
        description="Side of the square kernel of each convolution, one convolution per entry, padded to keep "
        "the image's size.",
    )
    pool: int | None = Field(
        None,
        ge=1,
        description="Side of the max pooling after each convolution; 2 when not given, and never any without "
        "`out_features`.",
    )
    out_features: int | None = Field(
        None, ge=1, description="Width of the output vector; an image of the input's shape when not given."
    )

    @model_validator(mode="after")
    def _pooled_images_become_vectors(self) -> ConvOptions:
        if self.out_features is None and self.pool is not None and self.pool > 1:
            raise ValueError(f"pool: expected out_features beside it, or a pool of 1, found pool {self.pool} alone")
        return self

    @property
    def pool_side(self) -> int:
        """Side of the pooling that is done; 1 is none."""
        return 1 if self.out_features is None else self.pool or 2


class Conv(nn.Module):
    """Convolution, ReLU and max pooling, repeated; then a linear head over all that is left of the image.

    Without ``out_features`` there is no pooling and the head is a 1x1 convolution, so that an image comes out.
    """

    def __init__(self, in_shape: tuple[int, ...], options: ConvOptions) -> None:
        super().__init__()
        require_dims("conv", in_shape, ("channels", "height", "width"))
        channels, height, width = in_shape
        self.convolutions = nn.ModuleList()
        self.pool = nn.MaxPool2d(options.pool_side)
        cost = 0
        for size in options.kernel_sizes:
            self.convolutions.append(nn.Conv2d(channels, options.channels, size, padding="same"))
            cost += channels * options.channels * size**2 * height * width
            channels = options.channels
            height, width = height // options.pool_side, width // options.pool_side
        if not height or not width:
            raise ConfigError(
                f"kind 'conv': pooling by {options.pool_side} after each of {len(options.kernel_sizes)} "
                f"convolutions leaves nothing of a {in_shape[1]}x{in_shape[2]} image; take fewer, or `pool: 1`"
            )
        self.head, out_shape = _head(in_shape, (channels, height, width), options.out_features)
        cost += channels * height * width * (options.out_features or in_shape[0])
        self.contract = ExpertContract(in_shape=in_shape, out_shape=out_shape, cost_per_row=cost)

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, channels, height, width)`` to ``(num_rows, out_features)``, or to images again."""
        for convolution in self.convolutions:
            rows = self.pool(convolution(rows).relu())
        outputs: Tensor = self.head(rows)
        return outputs


def _head(
    in_shape: tuple[int, ...], pooled_shape: tuple[int, int, int], out_features: int | None
) -> tuple[nn.Module, tuple[int, ...]]:
    if out_features is None:
        return nn.Conv2d(pooled_shape[0], in_shape[0], 1), in_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(pooled_shape), out_features)), (out_features,)


CONV = ExpertKind("conv", ConvOptions, Conv)
