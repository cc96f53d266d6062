"""What a model's experts have done and where they are, for people and programs that look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_runtime.integrations.transformers.actors import ExpertActors


@dataclass(frozen=True)
class ActorView:
    """One actor that serves an expert.

    Attributes:
        replica_id: Names the expert's replica there.
        state: ``ready``, or what it is instead.
        node: Name of its node.
        pid: Of its process.
        num_restarts: How often it was replaced.
    """

    replica_id: str
    state: str
    node: str
    pid: int | None
    num_restarts: int


@dataclass(frozen=True)
class ExpertView:
    """One expert of one layer.

    Attributes:
        expert: Its place in the layer.
        num_assignments: Tokens that this process sent it so far.
        actors: Those that serve it.
    """

    expert: int
    num_assignments: int
    actors: tuple[ActorView, ...]


@dataclass(frozen=True)
class LayerView:
    """One MoE layer of the model.

    Attributes:
        module: Path of the module in the model.
        layer: Name of the layer in the runtime.
        experts: In order.
    """

    module: str
    layer: str
    experts: tuple[ExpertView, ...]


@dataclass(frozen=True)
class ExpertsView:
    """The experts of a model.

    Attributes:
        layers: In the order of the model.
        num_dropped: Assignments of this process that no expert served, so far.
        num_retried: Assignments that were sent again because an expert had failed, so far.
    """

    layers: tuple[LayerView, ...]
    num_dropped: int
    num_retried: int


def view_of(actors: ExpertActors) -> ExpertsView:
    """What a model's experts have done so far, and where they are now.

    Raises:
        StartError: If the runtime's controller does not answer.
        UnavailableError: If the experts were closed.
    """
    actors.check_open()
    caller, described = actors.caller, actors.runtime.describe()["layers"]
    counts = caller.counts()
    return ExpertsView(
        layers=tuple(
            LayerView(module, layer, _experts(described[layer]["experts"], counts[layer]))
            for module, layer in actors.layers.items()
        ),
        num_dropped=caller.num_dropped,
        num_retried=caller.num_retried,
    )


def _experts(described: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> tuple[ExpertView, ...]:
    return tuple(
        ExpertView(
            expert=index,
            num_assignments=int(count),
            actors=tuple(
                ActorView(
                    replica_id=replica["replica_id"],
                    state=replica["state"],
                    node=replica["node"],
                    pid=replica["pid"],
                    num_restarts=replica["num_restarts"],
                )
                for replica in expert["replicas"]
            ),
        )
        for index, (expert, count) in enumerate(zip(described, counts, strict=True))
    )
