"""One actor and its node: chosen when the actor is created, and again when the node turns out to be gone or full."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.spawner import ActorHandle, NodeRefusedError, within

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.node_choice import NodeChooser
    from moe_runtime.ray_backend.pace import Pace
    from moe_runtime.ray_backend.placer import ActorDemand, NodeShape
    from moe_runtime.ray_backend.plan import Location
    from moe_runtime.ray_backend.spawner import AsyncClock, Spawner

_LOG = logging.getLogger(__name__)

#: After a refusal; a node that has just lost an actor needs a moment until it takes another.
_PAUSE_S = 0.5
_MAX_REFUSALS = 2

HandleT = TypeVar("HandleT", bound=ActorHandle)


@dataclass(frozen=True)
class Tools:
    """What every keeper of one runtime works with.

    Attributes:
        spawner: Creates and finds actors.
        chooser: Chooses nodes.
        clock: Tells the time and waits.
        pace: Timeouts and backoff.
    """

    spawner: Spawner
    chooser: NodeChooser
    clock: AsyncClock
    pace: Pace


class Seat(Generic[HandleT]):
    """Holds the actor of one keeper, and brings it onto a node.

    Attributes:
        actor: What the actor asks for.
        handle: The actor that was found or created last; None where there is none.
    """

    def __init__(self, actor: ActorDemand, *, spawn: Callable[[str | None], HandleT], tools: Tools) -> None:
        """Hold nobody yet.

        Args:
            actor: What the actor asks for.
            spawn: Creates it on the node of an id, or, for None, wherever Ray finds room.
            tools: Gives chooser, clock, and how long a killed actor may take to be gone.
        """
        self.handle: HandleT | None = None
        self.actor = actor
        self._spawn = spawn
        self._chooser = tools.chooser
        self._clock = tools.clock
        self._kill_timeout_s = tools.pace.kill_timeout_s

    async def take(self, timeout_s: float) -> Location:
        """Create the actor, unless it was found, and wait until it runs somewhere; where it runs.

        Raises:
            TimeoutError: If it runs nowhere in time.
            StartError: If it died.
        """
        deadline = self._clock.now() + timeout_s
        refusals: Counter[str] = Counter()
        while True:
            was_found, node = self.handle is not None, None
            if self.handle is None:
                node = self._chooser.choose(self.actor, avoiding=_avoided(refusals))
                self.handle = self._spawn(None if node is None else node.node_id)
            try:
                location = await within(self._clock, deadline - self._clock.now(), self.handle.locate())
            except StartError as exc:
                if not self._may_try_elsewhere(exc, node, was_found=was_found):
                    raise
                _LOG.info("%s: chooses another node: %s", self.actor.actor_id, exc)
                refusals.update(() if node is None else (node.name,))
                await self.leave()
                await self._clock.sleep(min(_PAUSE_S, deadline - self._clock.now()))
            else:
                self._chooser.settle(self.actor, location.node)
                return location

    async def leave(self) -> None:
        """End the actor, and wait until its name is free."""
        handle, self.handle = self.handle, None
        self._chooser.leave(self.actor)
        if handle is None:
            return
        await handle.kill()
        try:
            await within(self._clock, self._kill_timeout_s, handle.wait())
        except TimeoutError:
            _LOG.warning("%s: its old actor is not gone yet", self.actor.actor_id)

    def _may_try_elsewhere(self, error: StartError, node: NodeShape | None, *, was_found: bool) -> bool:
        """Whether it is the node's fault that the actor runs nowhere."""
        if isinstance(error, NodeRefusedError):
            return was_found or node is not None
        return node is not None and not self._chooser.is_there(node.name)


def _avoided(refusals: Counter[str]) -> set[str]:
    return {node for node, number in refusals.items() if number >= _MAX_REFUSALS}
