"""Remembers where the actors of one runtime stand, and chooses among the present nodes for the next ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_runtime.ray_backend.placer import Standing, place_actors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from moe_runtime.ray_backend.placer import ActorDemand, NodeShape
    from moe_runtime.ray_backend.spawner import AsyncClock

#: How long a node may go on reporting what a dead actor held.
_REPORT_LAG_S = 5.0


class NodeChooser:
    """Chooses a node for each actor by the placer's rules. Owned by the controller's event loop."""

    def __init__(self, nodes: Callable[[], Sequence[NodeShape]], *, clock: AsyncClock) -> None:
        """Know of no actor yet.

        Args:
            nodes: Tells the living nodes.
            clock: Tells the time.
        """
        self._nodes = nodes
        self._clock = clock
        self._settled: dict[str, Standing] = {}
        self._chosen: dict[str, Standing] = {}
        self._planned: dict[str, NodeShape] = {}
        self._gone: dict[str, _Gone] = {}

    def plan(self, actors: Iterable[ActorDemand]) -> None:
        """Choose for many actors together; ``choose`` hands each of them its node.

        Together, because those that are hardest to place have to come first, and because the cluster is slow to
        report what was just taken.
        """
        nodes = {node.name: node for node in self._nodes()}
        by_id = {actor.actor_id: actor for actor in actors}
        places = place_actors(tuple(nodes.values()), by_id.values(), standing=self._standing()).places
        for actor_id, place in places.items():
            self._planned[actor_id] = nodes[place.node]
            self._chosen[actor_id] = Standing(by_id[actor_id], place.node, is_reported=False)

    def choose(self, actor: ActorDemand, *, avoiding: Collection[str] = ()) -> NodeShape | None:
        """The node for an actor; None where no node that is there now has room: then it is left to Ray.

        Args:
            actor: The actor.
            avoiding: Names of nodes that turned it away.
        """
        planned = self._planned.pop(actor.actor_id, None)
        if planned is not None and planned.name not in avoiding:
            return planned
        self.leave(actor)
        nodes = {node.name: node for node in self._nodes() if node.name not in avoiding}
        place = place_actors(tuple(nodes.values()), [actor], standing=self._standing()).places.get(actor.actor_id)
        if place is None:
            return None
        self._chosen[actor.actor_id] = Standing(actor, place.node, is_reported=False)
        return nodes[place.node]

    def settle(self, actor: ActorDemand, node: str) -> None:
        """An actor runs on the node of that name."""
        for known in (self._chosen, self._planned, self._gone):
            known.pop(actor.actor_id, None)
        self._settled[actor.actor_id] = Standing(actor, node)

    def leave(self, actor: ActorDemand) -> None:
        """An actor is gone, or was never created."""
        if (standing := self._settled.get(actor.actor_id)) is not None:
            self._gone[actor.actor_id] = _Gone(replace(standing, is_gone=True), self._clock.now())
        for known in (self._settled, self._chosen, self._planned):
            known.pop(actor.actor_id, None)

    def is_there(self, node: str) -> bool:
        """Whether the node of that name is alive."""
        return any(each.name == node for each in self._nodes())

    def _standing(self) -> list[Standing]:
        oldest = self._clock.now() - _REPORT_LAG_S
        self._gone = {actor_id: gone for actor_id, gone in self._gone.items() if gone.since >= oldest}
        gone = [each.standing for each in self._gone.values()]
        return [*self._settled.values(), *self._chosen.values(), *gone]


@dataclass(frozen=True)
class _Gone:
    standing: Standing
    since: float
