"""How many assignments each expert of each layer got, how even that is, and which actors have the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Loads:
    """Assignments by layer and expert.

    Attributes:
        layers: One count per expert, by the layer's name, in the model's order.
    """

    layers: Mapping[str, tuple[int, ...]]

    def since(self, before: Loads) -> Loads:
        """What came on top of an earlier reading; a layer that it lacks started at nothing."""
        return Loads(
            {
                name: tuple(now - then for now, then in zip(counts, before.layers[name], strict=True))
                if name in before.layers
                else counts
                for name, counts in self.layers.items()
            }
        )

    def by_expert(self) -> tuple[int, ...]:
        """One count per expert index, over all layers; layers may have different numbers of experts."""
        totals = [0] * max(map(len, self.layers.values()), default=0)
        for counts in self.layers.values():
            for expert, count in enumerate(counts):
                totals[expert] += count
        return tuple(totals)

    def short_names(self) -> dict[str, str]:
        """Each layer's name without what all of them begin and end with: ``12`` for ``model.layers.12.mlp.experts``."""
        names = [name.split(".") for name in self.layers]
        num_before = _num_common(names)
        num_after = _num_common([name[::-1] for name in names])
        if len(names) < 2 or any(num_before + num_after >= len(name) for name in names):
            return {name: name for name in self.layers}
        return {
            name: ".".join(parts[num_before : len(parts) - num_after])
            for name, parts in zip(self.layers, names, strict=True)
        }


@dataclass(frozen=True)
class Actor:
    """One actor that has experts.

    Attributes:
        pid: Of its process.
        state: ``ready``, or what it is instead.
        num_restarts: How often it was replaced.
        experts: Their places in every layer.
    """

    pid: int
    state: str
    num_restarts: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """The experts at one moment.

    Attributes:
        loads: Assignments since they were started.
        actors: Those that have them.
        num_retried: Assignments that were sent again because an expert had failed.
    """

    loads: Loads
    actors: tuple[Actor, ...] = ()
    num_retried: int = 0


def max_over_mean(counts: Sequence[int]) -> float:
    """The busiest expert's load against the mean: 1 is even, the number of experts is all on one; 0 without any."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 0.0


def _num_common(names: Sequence[Sequence[str]]) -> int:
    """How many parts at the beginning are the same in all."""
    return next(
        (place for place, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1),
        min(map(len, names), default=0),
    )
