"""Chooses a node for each actor: pure functions over plain values, the same for a plan and for a running controller."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_runtime.ray_backend.node_room import NodeRoom
from moe_runtime.ray_backend.placement import demand_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moe_runtime.ray_backend.plan import Demand

Strategy = Literal["spread", "pack"]
_MAX_NAMED_NODES = 4


@dataclass(frozen=True)
class NodeShape:
    """A node as the placer sees it.

    Attributes:
        name: Unique in the cluster.
        node_id: Ray's id of the node; empty for one that is not there yet.
        labels: Its labels.
        total: What it has, by Ray's names of resources; memory in bytes; infinite where it is not known.
        free: What of it is not reserved, by this runtime or others; everything when None.
        ip: Its address; empty where that is not known.
    """

    name: str
    node_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] | None = None
    ip: str = ""


@dataclass(frozen=True)
class ActorDemand:
    """One actor that needs a node.

    Attributes:
        actor_id: Unique among those that are placed together.
        demand: What it asks for.
        layer: Actors of one layer are spread, or packed, together.
        twins: Actors of one such group do the same work, so that one node should not hold two of them.
        strategy: ``spread`` takes the node with the fewest actors of the layer, then the least loaded; ``pack`` the
            fullest one.
    """

    actor_id: str
    demand: Demand
    layer: str
    twins: str
    strategy: Strategy = "spread"


@dataclass(frozen=True)
class Standing:
    """An actor that has its node, or had it until just now: what nodes report lags behind.

    Attributes:
        actor: The actor.
        node: Name of its node.
        is_reported: Whether the node's free resources may be without what it takes.
        is_gone: Whether it is there no more.
    """

    actor: ActorDemand
    node: str
    is_reported: bool = True
    is_gone: bool = False


@dataclass(frozen=True)
class Place:
    """Where an actor goes: the name of a node, and which of its GPUs, by their numbers there."""

    node: str
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unplaceable:
    """An actor for which no node has room.

    Attributes:
        actor_id: The actor.
        asks: What it asks for, in words.
        lacks: What each node lacks, in words, by the node's name.
    """

    actor_id: str
    asks: str
    lacks: Mapping[str, str]

    def __str__(self) -> str:
        """One line: the actor, what it asks for, and what the nodes lack; nodes that lack the same are told once."""
        nodes: dict[str, list[str]] = {}
        for node, lack in self.lacks.items():
            nodes.setdefault(lack, []).append(node)
        lacks = "; ".join(f"{_names(names)}: {lack}" for lack, names in nodes.items())
        return f"{self.actor_id}: asks for {self.asks}; {lacks or 'there is no node'}"


@dataclass(frozen=True)
class Placement:
    """What the placer decided.

    Attributes:
        places: Where each actor goes, for those that have a place.
        unplaceable: The others, in the order in which they were tried.
    """

    places: Mapping[str, Place]
    unplaceable: tuple[Unplaceable, ...] = ()


def place_actors(
    nodes: Sequence[NodeShape], actors: Iterable[ActorDemand], *, standing: Sequence[Standing] = ()
) -> Placement:
    """A node for each actor, chosen one after the other: those that ask for most go first.

    A node is taken only if it has the labels and the room: a share of a GPU needs that share on one device. Twins go
    to nodes of their own wherever others have room. Equal input gives equal output.

    Args:
        nodes: The nodes; the first of equal ones is taken.
        actors: The actors that need one.
        standing: Actors that have one, or had; those on nodes that are not given count for nothing.
    """
    rooms = {node.name: _room(node, [each for each in standing if each.node == node.name]) for node in nodes}
    residents = {node.name: Counter[str]() for node in nodes}
    for each in standing:
        if each.node in residents and not each.is_gone:
            residents[each.node].update(_groups(each.actor))
    places: dict[str, Place] = {}
    unplaceable = []
    for actor in sorted(actors, key=_size, reverse=True):
        node = _choose(actor, rooms, residents)
        if node is None:
            unplaceable.append(_unplaceable(actor, rooms))
            continue
        places[actor.actor_id] = Place(node, rooms[node].take(actor.demand))
        residents[node].update(_groups(actor))
    return Placement(places, tuple(unplaceable))


def _room(node: NodeShape, standing: Sequence[Standing]) -> NodeRoom:
    room = NodeRoom(node.total, labels=node.labels)
    free = node.total if node.free is None else node.free
    room.take_foreign(free, known=[each.actor.demand for each in standing if each.is_reported])
    for each in standing:
        if not each.is_gone:
            room.take(each.actor.demand, whatever_is_left=True)
    return room


def _choose(actor: ActorDemand, rooms: Mapping[str, NodeRoom], residents: Mapping[str, Counter[str]]) -> str | None:
    layer, twins = _groups(actor)

    def rank(name: str) -> tuple[float, ...]:
        used = rooms[name].share_used()
        here = residents[name]
        return (here[twins], -used) if actor.strategy == "pack" else (here[twins], here[layer], used)

    fitting = [name for name, room in rooms.items() if room.fits(actor.demand)]
    return min(fitting, key=rank, default=None)


def _groups(actor: ActorDemand) -> tuple[str, str]:
    """Keys of the actor's layer and of its twins, which may share a name."""
    return f"layer {actor.layer}", f"twins {actor.twins}"


def _size(actor: ActorDemand) -> tuple[float, ...]:
    """What is hardest to place comes first: labels, GPUs, custom resources, memory, CPUs."""
    demand = actor.demand
    return (
        len(demand.node_labels),
        demand.num_gpus,
        sum(demand.custom.values()),
        demand.memory_bytes or 0,
        demand.num_cpus,
    )


def _unplaceable(actor: ActorDemand, rooms: Mapping[str, NodeRoom]) -> Unplaceable:
    lacks = {name: room.lack(actor.demand) for name, room in rooms.items()}
    return Unplaceable(actor.actor_id, demand_text(actor.demand), lacks)


def _names(nodes: Sequence[str]) -> str:
    if len(nodes) <= _MAX_NAMED_NODES:
        return ", ".join(nodes)
    return f"{', '.join(nodes[: _MAX_NAMED_NODES - 1])} and {len(nodes) - _MAX_NAMED_NODES + 1} more nodes"
