"""What every actor of a runtime is told, and keeps: the newest snapshot, which a controller that comes back adopts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from moe_runtime.ray_backend.callers import Callers
from moe_runtime.ray_backend.plan import Snapshot
from moe_runtime.ray_backend.spawner import within
from moe_runtime.service.online_bias import OnlineBias
from moe_runtime.service.routing_table import ReplicaState, RoutingTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moe_runtime.ray_backend.fleet import Fleet
    from moe_runtime.ray_backend.spawner import ActorHandle, AsyncClock

#: How long an actor may keep the next table waiting; one that takes longer still gets this one.
_HAND_OVER_S = 1.0
#: Bounds what is asked of actors that may hang: handing them a table, asking what they keep, ending them.
CALL_TIMEOUT_S = 5.0


class Board:
    """Makes snapshots of a fleet and hands them to its actors. Owned by the controller's event loop.

    Attributes:
        fleet: What the next snapshot is of.
        leaving_keys: Keys, by index, of routers that are not in the fleet any more and still answer requests.
        snapshot: The newest.
        bias: What serving has added to the layers' selection biases; of the next snapshot.
        changed: Set when there has to be a newer one.
        callers: Programs that route for themselves; hosts admit them as they do routers.
    """

    def __init__(self, clock: AsyncClock) -> None:
        """Publish nothing yet; ``fleet`` has to be set first."""
        self.fleet: Fleet
        self.leaving_keys: dict[int, str] = {}
        self.snapshot = Snapshot()
        self.bias = OnlineBias()
        self.changed = asyncio.Event()
        self.callers = Callers(clock, on_change=self.changed.set)
        self._clock = clock

    async def publish_changes(self) -> None:
        """Publish whenever something has changed, for ever."""
        while True:
            await self.changed.wait()
            await self.publish()

    async def publish(self) -> None:
        """Make the next version of the table, and hand it to every actor."""
        self.changed.clear()
        await self._introduce_routers()
        # From here to the handing over without a break: a version has one content.
        fleet = self.fleet
        self.bias.follow(fleet.plan.balance)
        # Above what an earlier controller has given out, should nobody have kept that.
        version = max(self.snapshot.table.version, self.callers.newest_known()) + 1
        table = RoutingTable(version, fleet.replicas(), self.bias.biases)
        addresses = {keeper.index: keeper.bound for keeper in fleet.routers if keeper.bound is not None}
        self.snapshot = Snapshot(table, addresses, self._public_keys(), self.callers.keys, fleet.plan)
        self.callers.publish(self.snapshot)
        handles: list[ActorHandle] = [keeper.handle for keeper in fleet.routers if keeper.handle is not None]
        handles += [k.handle for k in fleet.hosts if k.life.state is ReplicaState.READY and k.handle]
        await self.bounded((handle.keep(self.snapshot) for handle in handles), _HAND_OVER_S)

    async def adopt_newest(self, handles: Iterable[ActorHandle]) -> None:
        """Take over the newest snapshot that any of these actors keeps."""
        kept = await self.bounded(handle.kept() for handle in handles)
        snapshots = [snapshot for snapshot in kept if isinstance(snapshot, Snapshot)]
        self.snapshot = max((*snapshots, self.snapshot), key=lambda snapshot: snapshot.table.version)
        self.bias.adopt(self.snapshot.table.biases)
        self.callers.adopt(self.snapshot.caller_keys)

    async def bounded(self, calls: Iterable[Any], timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """The calls' results or errors, each within a time."""
        return await asyncio.gather(*(within(self._clock, timeout_s, call) for call in calls), return_exceptions=True)

    async def _introduce_routers(self) -> None:
        """Have every ready host admit every router: whoever is in the table must not turn a router away."""
        # More than once, where a host or a router comes back meanwhile.
        while True:
            public_keys = frozenset(self._public_keys().values()) | self.callers.keys
            hosts = [keeper for keeper in self.fleet.hosts if keeper.has_to_admit(public_keys)]
            if not hosts:
                return
            await asyncio.gather(*(keeper.admit(public_keys) for keeper in hosts))

    def _public_keys(self) -> dict[int, str]:
        present = {keeper.index: keeper.public_key for keeper in self.fleet.routers if keeper.public_key is not None}
        return {**self.leaving_keys, **present}
