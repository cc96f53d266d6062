"""What a narrow ``wire_dtype`` costs in precision: a layer's outputs beside those of the same layer in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.bench.deployment import layer_config
from moe_runtime.bench.hosts import layer_in_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from moe_runtime.config.models import DTypeName

NARROW: tuple[DTypeName, ...] = ("bfloat16", "float16")
_TOKENS, _FEATURES = 512, 1024
_PERCENT = 100.0


@dataclass(frozen=True)
class WireError:
    """The error of a layer's outputs, in percent.

    Attributes:
        rms: Root mean square of the differences, of that of the outputs.
        largest: Largest difference, of the largest output.
    """

    rms: float
    largest: float

    @classmethod
    def between(cls, outputs: Tensor, exact: Tensor) -> WireError:
        """The error of some outputs beside those that nothing rounded."""
        difference = outputs - exact
        rms = float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
        return cls(_PERCENT * rms, _PERCENT * float(difference.abs().max() / exact.abs().max()))


def measure_errors(kind: str, options: Mapping[str, Any]) -> Iterator[tuple[str, WireError]]:
    """The error of each narrow wire, by its dtype: top-2 of 8 experts of random weights, 512 tokens, H = 1024.

    Args:
        kind: Of the experts.
        options: Theirs.
    """
    tokens = torch.randn(_TOKENS, _FEATURES, generator=torch.Generator().manual_seed(0))
    exact = _outputs(kind, options, tokens, wire_dtype="float32")
    for wire_dtype in NARROW:
        yield wire_dtype, WireError.between(_outputs(kind, options, tokens, wire_dtype=wire_dtype), exact)


def _outputs(kind: str, options: Mapping[str, Any], tokens: Tensor, *, wire_dtype: str) -> Tensor:
    # Weights are drawn by layer and name, so those of the next wire are the same.
    config = layer_config(kind=kind, options=options, experts_per_actor=8, wire_dtype=wire_dtype)
    with layer_in_process(config) as layer:
        return layer.forward(tokens).outputs
