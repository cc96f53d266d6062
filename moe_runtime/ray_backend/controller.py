"""Holds the desired state of one runtime, and makes it so: the only one that creates, replaces and ends actors.

Plain asyncio over the ports ``Spawner`` and ``AsyncClock``; an actor wraps it. Traffic goes on while it is away:
routers keep their table, and a controller that comes back adopts the actors that live and the newest snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError, PlacementError, StartError
from moe_runtime.ray_backend.addresses import next_address, router_addresses
from moe_runtime.ray_backend.host_keeper import HostKeeper, Pace
from moe_runtime.ray_backend.node_choice import NodeChooser
from moe_runtime.ray_backend.plan import Snapshot
from moe_runtime.ray_backend.router_keeper import RouterKeeper
from moe_runtime.ray_backend.seat import Tools
from moe_runtime.ray_backend.spawner import within
from moe_runtime.service.routing_table import ReplicaState, RoutingTable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterable

    from moe_runtime.ray_backend.plan import Location, RuntimePlan
    from moe_runtime.ray_backend.spawner import ActorHandle, AsyncClock, Spawner
    from moe_runtime.service.routing_table import Replica

_LOG = logging.getLogger(__name__)

#: Bounds what is asked of actors that may hang: handing them a table, asking what they keep, ending them.
_CALL_TIMEOUT_S = 5.0


class Controller:
    """Keeps one runtime's hosts and routers alive, and their routing table current.

    Every method runs in one event loop. ``start`` or ``resume`` comes first, once.
    """

    def __init__(self, plan: RuntimePlan, *, spawner: Spawner, clock: AsyncClock, pace: Pace | None = None) -> None:
        """Start nothing yet.

        Args:
            plan: The desired state.
            spawner: Creates and finds actors.
            clock: Tells the time and waits.
            pace: Timeouts and backoff; its ``start_timeout_s`` is replaced by the plan's.
        """
        self._plan = plan
        self._clock = clock
        pace = replace(pace or Pace(), start_timeout_s=plan.start_timeout_s)
        self._dirty = asyncio.Event()
        self._chooser = NodeChooser(spawner.nodes, clock=clock)
        tools = Tools(spawner, self._chooser, clock, pace)
        self._hosts = [
            HostKeeper(host, tools=tools, threads_on=self._threads_on, on_change=self._dirty.set) for host in plan.hosts
        ]
        self._routers = [
            RouterKeeper(plan.routers, index, tools=tools, new_address=self._new_address, on_change=self._dirty.set)
            for index in range(plan.routers.count)
        ]
        self._keepers: list[HostKeeper | RouterKeeper] = [*self._hosts, *self._routers]
        self._snapshot = Snapshot()
        self._tasks: list[asyncio.Task[None]] = []
        self._lease_until = clock.now() + (plan.lease_s or 0.0)
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Bring everything up, all actors in parallel, for the first time.

        Raises:
            PlacementError: If the cluster has no room for an actor in time.
            StartError: If an actor did not start; the message holds every actor's error. Nothing is left behind.
        """
        self._chooser.plan(self._plan.actors)
        try:
            await self._all_or_nothing([keeper.place() for keeper in self._keepers])
            addresses = self._addresses()
            # Only now: with threads: auto a host's share of its node depends on who else is there.
            await self._all_or_nothing(
                [keeper.start() for keeper in self._hosts]
                + [keeper.start(a) for keeper, a in zip(self._routers, addresses, strict=True)]
            )
        except StartError:
            await self.close(drain_timeout_s=0.0)
            raise
        await self._publish()
        # Whoever asked for the start renews from its end on, and it may have taken longer than a lease.
        self.renew()
        self._supervise()

    async def resume(self) -> None:
        """Take over what an earlier controller of this runtime left running, and go on supervising."""
        self.renew()
        # A host that hangs must not hold up the rest: its keeper tries again by itself.
        await self._bounded((keeper.adopt() for keeper in self._hosts), _CALL_TIMEOUT_S)
        await self._adopt_routers()
        await self._publish()
        self._supervise()

    def renew(self) -> None:
        """Extend the lease from now on."""
        self._lease_until = self._clock.now() + (self._plan.lease_s or 0.0)

    async def wait_ended(self) -> None:
        """Return when the lease has run out and everything was torn down, or after ``close``."""
        await self._ended.wait()

    async def close(self, *, drain_timeout_s: float) -> bool:
        """Drain the routers, then end every actor of the runtime; whether every request was answered."""
        for task in self._tasks:
            task.cancel()
        routers = _ready(self._routers)
        drained = True
        if drain_timeout_s > 0:
            limit_s = drain_timeout_s + _CALL_TIMEOUT_S
            results = await self._bounded((router.drain(drain_timeout_s) for router in routers), limit_s)
            drained = all(result is True for result in results)
        # Routers first: a host that stops under a router would look like a failure.
        await self._bounded((router.stop() for router in routers), _CALL_TIMEOUT_S)
        await self._bounded((host.stop() for host in _ready(self._hosts)), _CALL_TIMEOUT_S)
        await asyncio.gather(*(keeper.handle.kill() for keeper in self._keepers if keeper.handle is not None))
        for host in self._hosts:
            host.clean_up()
        self._ended.set()
        return drained

    def progress(self) -> tuple[int, int]:
        """Number of actors that are ready, and of all."""
        num_ready = sum(keeper.life.state is ReplicaState.READY for keeper in self._keepers)
        return num_ready, len(self._keepers)

    def addresses(self) -> list[str]:
        """Where clients find the routers that were started."""
        return [keeper.address for keeper in self._routers if keeper.address is not None]

    async def describe(self) -> dict[str, Any]:
        """Layers as a router sees them, and hosts and routers with their states, as plain values."""
        return {
            "name": self._plan.name,
            "deployment": self._plan.deployment,
            "table_version": self._snapshot.table.version,
            "addresses": self.addresses(),
            "layers": await self._describe_layers(),
            "hosts": [keeper.describe() for keeper in self._hosts],
            "routers": [keeper.describe() for keeper in self._routers],
        }

    def _supervise(self) -> None:
        loops: list[Coroutine[Any, Any, None]] = [keeper.keep() for keeper in self._keepers]
        loops.append(self._publish_changes())
        if self._plan.lease_s is not None:
            loops.append(self._watch_lease())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(_log_failure)

    def _threads_on(self, location: Location) -> int:
        if self._plan.num_threads is not None:
            return self._plan.num_threads
        num_experts = sum(
            len(keeper.plan.replicas)
            for keeper in self._hosts
            if keeper.location is not None and keeper.location.node == location.node
        )
        return max(1, location.num_cores // max(1, num_experts))

    def _addresses(self) -> list[str]:
        places = [keeper.location for keeper in self._routers if keeper.location is not None]
        nodes, ips = [place.node for place in places], [place.ip for place in places]
        try:
            return router_addresses(self._plan.routers.address, nodes, ips=ips)
        except ConfigError as exc:
            raise StartError(str(exc)) from exc

    def _new_address(self, location: Location) -> str:
        """For a router that comes to a place where others may be."""
        here = [k for k in self._routers if k.location is not None and k.location.node == location.node]
        taken = [k.bound for k in here if k.bound is not None and k.life.state is ReplicaState.READY]
        try:
            return next_address(self._plan.routers.address, ip=location.ip, taken=taken)
        except ConfigError as exc:
            raise StartError(str(exc)) from exc

    async def _all_or_nothing(self, starts: Iterable[Awaitable[None]]) -> None:
        results = await asyncio.gather(*starts, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if not errors:
            return
        for error in errors:
            if not isinstance(error, StartError):
                raise error
        # One line per distinct error: many hosts that fail alike should not hide the one that fails otherwise.
        text = "\n".join(dict.fromkeys(str(error) for error in errors))
        kind = PlacementError if all(isinstance(error, PlacementError) for error in errors) else StartError
        raise kind(text) from errors[0]

    async def _describe_layers(self) -> dict[str, Any]:
        routers = _ready(self._routers)[:1]
        for description in await self._bounded((router.describe() for router in routers), _CALL_TIMEOUT_S):
            if isinstance(description, dict):
                layers: dict[str, Any] = description.get("layers", {})
                return layers
        return {}

    async def _adopt_routers(self) -> None:
        """Find the routers and take over the newest snapshot that any actor keeps."""
        # Nor must a router that Ray is restarting.
        await self._bounded((keeper.place() for keeper in self._routers), _CALL_TIMEOUT_S)
        handles = [keeper.handle for keeper in self._keepers if keeper.handle is not None]
        kept = await self._bounded((handle.kept() for handle in handles), _CALL_TIMEOUT_S)
        snapshots = [snapshot for snapshot in kept if isinstance(snapshot, Snapshot)]
        self._snapshot = max((*snapshots, self._snapshot), key=lambda snapshot: snapshot.table.version)
        for keeper in self._routers:
            keeper.bound = self._snapshot.addresses.get(keeper.index)
            # Until it says itself: hosts would forget the key of a router that does not answer just now.
            keeper.public_key = self._snapshot.public_keys.get(keeper.index)
        await self._bounded(
            (keeper.start(keeper.bound) for keeper in self._routers if keeper.handle and keeper.bound),
            _CALL_TIMEOUT_S,
        )

    async def _publish_changes(self) -> None:
        while True:
            await self._dirty.wait()
            await self._publish()

    async def _publish(self) -> None:
        """Make the next version of the table, and hand it to every actor."""
        self._dirty.clear()
        await self._introduce_routers()
        replicas: dict[tuple[str, int], tuple[Replica, ...]] = {}
        for keeper in self._hosts:
            for plan, replica in keeper.replicas():
                key = (plan.layer, plan.expert_id)
                replicas[key] = (*replicas.get(key, ()), replica)
        addresses = {keeper.index: keeper.bound for keeper in self._routers if keeper.bound is not None}
        table = RoutingTable(self._snapshot.table.version + 1, replicas)
        self._snapshot = Snapshot(table, addresses, self._public_keys())
        handles: list[ActorHandle] = [keeper.handle for keeper in self._routers if keeper.handle is not None]
        handles += [
            keeper.handle for keeper in self._hosts if keeper.life.state is ReplicaState.READY and keeper.handle
        ]
        await self._bounded((handle.keep(self._snapshot) for handle in handles), _CALL_TIMEOUT_S)

    async def _introduce_routers(self) -> None:
        """Have every ready host admit every router: whoever is in the table must not turn a router away."""
        # More than once, where a host or a router comes back meanwhile.
        while True:
            public_keys = frozenset(self._public_keys().values())
            hosts = [keeper for keeper in self._hosts if keeper.has_to_admit(public_keys)]
            if not hosts:
                return
            await asyncio.gather(*(keeper.admit(public_keys) for keeper in hosts))

    def _public_keys(self) -> dict[int, str]:
        return {keeper.index: keeper.public_key for keeper in self._routers if keeper.public_key is not None}

    async def _watch_lease(self) -> None:
        while (remaining_s := self._lease_until - self._clock.now()) > 0:
            await self._clock.sleep(remaining_s)
        _LOG.warning("runtime %s: its lease ran out; tearing it down", self._plan.name)
        # Not in this task, which `close` cancels.
        self._tasks.remove(asyncio.current_task())  # type: ignore[arg-type]  # a loop's task is never None here
        await self.close(drain_timeout_s=0.0)

    async def _bounded(self, calls: Iterable[Any], timeout_s: float) -> list[Any]:
        """The calls' results or errors, each within a time."""
        return await asyncio.gather(*(within(self._clock, timeout_s, call) for call in calls), return_exceptions=True)


def _ready(keepers: Iterable[HostKeeper | RouterKeeper]) -> list[Any]:
    """Handles of what serves; the others would not answer."""
    return [k.handle for k in keepers if k.life.state is ReplicaState.READY and k.handle is not None]


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOG.error("a supervising task of the controller failed", exc_info=error)
