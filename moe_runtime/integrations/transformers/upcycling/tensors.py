"""Which tensors a mixture's checkpoint holds, and what each is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.integrations.transformers.upcycling.dense import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_runtime.integrations.transformers.upcycling.dense import DenseCheckpoint
    from moe_runtime.integrations.transformers.upcycling.layouts import Layout
    from moe_runtime.integrations.transformers.upcycling.options import Upcycling

#: The value of a shared expert's gate whose weights are all 0: sigmoid(0). The routed experts make the other half.
_SHARED_SHARE = 0.5
_MLP = ".mlp."


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the mixture.

    Attributes:
        name: In the mixture's checkpoint.
        shape: As it is there.
        source: The dense tensor that it is a copy of; None where it is drawn.
        scale: What the copy is multiplied by.
        noise: Standard deviation of what is added to the copy, relative to the copy's own.
        std: Standard deviation of what is drawn; with 0, it is zeros.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    scale: float = 1.0
    noise: float = 0.0
    std: float = 0.0

    def make(self, read: Callable[[str], torch.Tensor], *, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """The tensor's values.

        Args:
            read: Reads a dense tensor.
            seed: Of what is drawn and added.
            dtype: Of the outcome; noise is added and scaled in float32.
        """
        if self.source is None:
            return (self._draw(seed) * self.std if self.std else torch.zeros(self.shape)).to(dtype)
        values = read(self.source)
        if self.noise:
            values = values.float()
            values = values + self._draw(seed) * (self.noise * values.std(correction=0))
        if self.scale != 1.0:
            values = values.float() * self.scale
        return values.to(dtype)

    def _draw(self, seed: int) -> torch.Tensor:
        """Standard normal values, the same whenever the seed and the tensor's name are."""
        digest = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(self.shape, generator=generator)


def plan_tensors(dense: DenseCheckpoint, layout: Layout, options: Upcycling) -> tuple[PlannedTensor, ...]:
    """Every tensor of the mixture, layer by layer; the dense tensors of a layer are neighbours.

    A shared expert has a gate of its own, a sigmoid without a bias, which no weights can bring to the constant 1: it
    starts at zero weights, which is 0.5 for every token, and the routed experts' last matrix is halved. That is exact.
    """
    num_layers = layout.config.num_hidden_layers
    outside = [name for name in dense.shapes if _MLP not in name and not _is_dropped(name, layout)]
    planned = [PlannedTensor(name, dense.shapes[name], source=name) for name in outside if ".layers." not in name]
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        planned += [PlannedTensor(name, dense.shapes[name], source=name) for name in outside if name.startswith(prefix)]
        planned += _plan_block(dense, layout, options, prefix)
    return tuple(planned)


def _is_dropped(name: str, layout: Layout) -> bool:
    return name == LM_HEAD and layout.config.tie_word_embeddings


def is_untied(dense: DenseCheckpoint) -> bool:
    """Whether a checkpoint whose configuration ties its head to the embedding holds a head that differs from it.

    transformers leaves such a head untied, so its mixture has to say that it is.
    """
    if not dense.config.tie_word_embeddings or LM_HEAD not in dense.shapes:
        return False
    return not torch.equal(dense.read(LM_HEAD), dense.read(EMBEDDING))


def _plan_block(dense: DenseCheckpoint, layout: Layout, options: Upcycling, prefix: str) -> Iterator[PlannedTensor]:
    """The gate and the experts of one layer."""
    hidden_size = layout.config.hidden_size
    block = f"{prefix}{layout.block}"
    std = options.gate_std if options.gate_init == "normal" else 0.0
    yield PlannedTensor(f"{block}.gate.weight", (options.experts, hidden_size), std=std)
    if layout.shared_size:
        yield PlannedTensor(f"{block}.shared_expert_gate.weight", (1, hidden_size))
    for name, target in layout.projections.items():
        source = f"{prefix}mlp.{name}.weight"
        if options.shared:
            yield PlannedTensor(f"{block}.shared_expert.{target}.weight", dense.shapes[source], source=source)
        elif layout.shared_size:
            size = layout.shared_size
            shape = (hidden_size, size) if name == "down_proj" else (size, hidden_size)
            yield PlannedTensor(f"{block}.shared_expert.{target}.weight", shape)
    for expert in range(options.experts):
        for name, target in layout.projections.items():
            source = f"{prefix}mlp.{name}.weight"
            yield PlannedTensor(
                f"{block}.experts.{expert}.{target}.weight",
                dense.shapes[source],
                source=source,
                scale=1 - _SHARED_SHARE if options.shared and name == "down_proj" else 1.0,
                noise=options.noise,
            )
