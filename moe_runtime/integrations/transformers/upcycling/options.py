"""What a dense model is to become: how many experts, and how their gate and copies start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moe_runtime.errors import ConfigError

GateInit = Literal["normal", "zeros"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

#: 5 GB, so that a checkpoint's files can be read and copied apart.
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture of experts, by sparse upcycling (https://arxiv.org/abs/2212.05055).

    Attributes:
        experts: Copies of each layer's MLP.
        top_k: How many of them work on a token. Their weights sum to 1, so that equal copies are the dense layer.
        shared: The MLP becomes a shared expert as well, which works on every token; it and the chosen experts then
            make half of the layer's output each. The checkpoint is a Qwen2-MoE: the Mixtral layout has no shared one.
        noise: Standard deviation of what is added to every weight of a copy, relative to that of the weight matrix.
            With 0, the model computes what the dense one does.
        gate_init: ``normal`` draws the gates' weights; with ``zeros`` every expert scores the same, so that all
            tokens choose the first ones until the gate is trained.
        gate_std: Standard deviation of ``normal``.
        seed: Of the gates and the noise. A tensor's draw depends on it and the tensor's name, on nothing else.
        dtype: Of all weights; ``auto`` is the dense checkpoint's, and float32 for quantised GGUF files.
        max_shard_bytes: No weight file is larger, unless one tensor is.

    Raises:
        ConfigError: If a value cannot work.
    """

    experts: int = 4
    top_k: int = 2
    shared: bool = False
    noise: float = 0.0
    gate_init: GateInit = "normal"
    gate_std: float = 0.02
    seed: int = 0
    dtype: DTypeName = "auto"
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        _expect(self.experts >= 1, "experts", "1 or more", self.experts)
        _expect(1 <= self.top_k <= self.experts, "top_k", f"1 to {self.experts}, the number of experts", self.top_k)
        _expect(0 <= self.noise < float("inf"), "noise", "0 or more, and finite", self.noise)
        _expect(self.gate_init in get_args(GateInit), "gate_init", " or ".join(get_args(GateInit)), self.gate_init)
        _expect(0 < self.gate_std < float("inf"), "gate_std", "more than 0, and finite", self.gate_std)
        _expect(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        _expect(self.dtype in get_args(DTypeName), "dtype", ", ".join(get_args(DTypeName)), self.dtype)
        _expect(self.max_shard_bytes >= 1, "max_shard_bytes", "1 or more", self.max_shard_bytes)


def _expect(is_fine: bool, name: str, expected: str, found: object) -> None:
    if not is_fine:
        raise ConfigError(f"{name}: expected {expected}; found {found}")
