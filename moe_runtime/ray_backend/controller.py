"""Holds the desired state of one runtime, and makes it so: the only one that creates, replaces and ends actors.

Plain asyncio over the ports ``Spawner`` and ``AsyncClock``; an actor wraps it. Traffic goes on while it is away:
routers keep their table, and a controller that comes back adopts the actors that live and the newest snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.balancing import Balancing
from moe_runtime.ray_backend.board import CALL_TIMEOUT_S, Board
from moe_runtime.ray_backend.changes import Changes
from moe_runtime.ray_backend.fleet import Fleet, ready_handles
from moe_runtime.ray_backend.node_choice import NodeChooser
from moe_runtime.ray_backend.pace import Pace
from moe_runtime.ray_backend.retirement import StrayHost, StrayRouter
from moe_runtime.ray_backend.seat import Tools

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from moe_runtime.ray_backend.caller_notes import CallerNews, CallerNote
    from moe_runtime.ray_backend.changes import Restarted, RestartTerms
    from moe_runtime.ray_backend.fleet import Keeper
    from moe_runtime.ray_backend.host_keeper import HostKeeper
    from moe_runtime.ray_backend.plan import RuntimePlan
    from moe_runtime.ray_backend.roll import Upgraded
    from moe_runtime.ray_backend.spawner import AsyncClock, Spawner
    from moe_runtime.service.routing_table import RoutingTable

_LOG = logging.getLogger(__name__)

#: A sleep that takes so much longer than it should was interrupted.
_LEASE_STEP_S = 1.0
ResultT = TypeVar("ResultT")


class Controller:
    """Keeps one runtime's hosts and routers alive, and their routing table current.

    Every method runs in one event loop. ``start`` or ``resume`` comes first, once.
    """

    def __init__(self, plan: RuntimePlan, *, spawner: Spawner, clock: AsyncClock, pace: Pace | None = None) -> None:
        """Start nothing yet.

        Args:
            plan: The desired state, until an upgrade brings another.
            spawner: Creates and finds actors.
            clock: Tells the time and waits.
            pace: Timeouts and backoff; its ``start_timeout_s`` is replaced by the plan's.
        """
        self._clock = clock
        self._spawner = spawner
        self._tools = Tools(spawner, NodeChooser(spawner.nodes, clock=clock), clock, pace or Pace())
        self._board = Board(clock)
        self._changes = Changes(self._board, clock, supervisor=self)
        self._board.fleet = self.make_fleet(plan)
        self._loops: set[asyncio.Task[Any]] = set()
        self._watches: dict[Keeper, asyncio.Task[None]] = {}
        self._lease_until = clock.now() + (plan.lease_s or 0.0)
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Bring everything up, all actors in parallel, for the first time.

        Raises:
            PlacementError: If the cluster has no room for an actor in time.
            StartError: If an actor did not start; the message holds every actor's error. Nothing is left behind.
        """
        try:
            await self._fleet.bring_up()
        except StartError:
            await self.close(drain_timeout_s=0.0)
            raise
        await self._board.publish()
        # Whoever asked for the start renews from its end on, and it may have taken longer than a lease.
        self.renew()
        self._supervise()

    async def resume(self) -> None:
        """Take over what an earlier controller of this runtime left running, and go on supervising.

        The plan is that of the newest snapshot: an upgrade may have brought one since this controller was made.
        """
        hosts, routers = self._spawner.others(None)
        # An actor that hangs must not hold up the rest, nor a router that Ray is restarting.
        await self._board.adopt_newest([*hosts, *routers])
        snapshot = self._board.snapshot
        if snapshot.plan is not None:
            self._board.fleet = self.make_fleet(snapshot.plan)
        self.renew()
        strays = self._strays()
        await self._board.bounded(keeper.adopt() for keeper in self._fleet.hosts)
        await self._adopt_routers()
        await self._board.publish()
        self._supervise()
        self.spawn_task(await self._changes.retire_strays(*strays))

    async def upgrade(self, plan: RuntimePlan, *, instead_of: bytes | None = None) -> Upgraded:
        """Roll to another plan while requests go on; when it returns, only what that plan has is left.

        One at a time. Failed or interrupted, it leaves either the old plan serving or the new one, and may be
        repeated; there is nothing to do where the plan is the one that runs.

        Args:
            plan: The desired state.
            instead_of: The source of the plan that it was made from, if it must not take another one's place.

        Raises:
            ChangedMeanwhileError: If another one runs by now.
            ConfigError: If the plan changes what cannot change while a runtime runs; nothing was done.
            PlacementError: If the cluster has no room for new actors beside those that run.
            StartError: If something new did not start. Then as before, the old plan serves.
        """
        return await self._changes.upgrade(plan, instead_of=instead_of)

    def restart_terms(self) -> RestartTerms:
        """Of a restart that begins now."""
        return self._changes.restart_terms()

    async def restart(self, *, generation: int, routers: bool) -> Restarted:
        """Give actors other processes while requests go on, one after the other.

        A successor of each expert host starts beside it, and takes its place when it is ready; each router is drained
        and comes back at its address. Failed or interrupted, it may be repeated: what was done is not done again for
        hosts.

        Args:
            generation: Hosts of an earlier one get a successor of this one; that of the terms means all, 0 none.
            routers: Whether routers restart.

        Raises:
            PlacementError: If the cluster has no room for one more host.
            StartError: If something did not start. What it was to replace serves; a router is brought back.
        """
        return await self._changes.restart(generation=generation, routers=routers)

    def renew(self) -> None:
        """Extend the lease from now on."""
        self._lease_until = self._clock.now() + (self.plan.lease_s or 0.0)

    async def wait_ended(self) -> None:
        """Return when the lease has run out and everything was torn down, or after ``close``."""
        await self._ended.wait()

    async def close(self, *, drain_timeout_s: float) -> bool:
        """Drain the routers, then end every actor of the runtime; whether every request was answered."""
        for task in self._tasks:
            task.cancel()
        self._board.callers.end(f"runtime {self.plan.name}: it was closed")
        # An upgrade that is under way first ends what is new.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        fleet, bounded = self._fleet, self._board.bounded
        routers = ready_handles(fleet.routers)
        drained = True
        if drain_timeout_s > 0:
            limit_s = drain_timeout_s + CALL_TIMEOUT_S
            results = await bounded((router.drain(drain_timeout_s) for router in routers), limit_s)
            drained = all(result is True for result in results)
        # Routers first: a host that stops under a router would look like a failure.
        await bounded(router.stop() for router in routers)
        await bounded(host.stop() for host in ready_handles(fleet.hosts))
        await asyncio.gather(*(keeper.handle.kill() for keeper in fleet.keepers if keeper.handle is not None))
        for host in fleet.hosts:
            host.clean_up()
        await asyncio.gather(*(stray.end() for strays in self._strays() for stray in strays))
        self._ended.set()
        return drained

    def caller_left(self, caller: str) -> None:
        """A program routes for itself no longer."""
        self._board.callers.leave(caller)

    async def caller_news(self, note: CallerNote, *, timeout_s: float) -> CallerNews | None:
        """What a program that routes for itself does not know yet; see ``Callers.news``."""
        return await self._board.callers.news(note, timeout_s=timeout_s)

    def progress(self) -> tuple[int, int]:
        """Number of actors that are ready, and of all; during an upgrade, of those that there will be."""
        return self._changes.coming.progress()

    def addresses(self) -> list[str]:
        """Where clients find the routers that were started."""
        return self._fleet.addresses()

    async def describe(self) -> dict[str, Any]:
        """Layers as a router sees them, and hosts and routers with their states, as plain values."""
        return {
            "name": self.plan.name,
            "deployment": self.plan.deployment,
            "table_version": self._board.snapshot.table.version,
            "addresses": self.addresses(),
            "layers": await self._describe_layers(),
            **self._fleet.describe(),
            "upgrade": self._changes.describe(),
            "balance": self._board.bias.describe(),
            "callers": self._board.callers.describe(),
        }

    @property
    def plan(self) -> RuntimePlan:
        """The desired state: that of the last upgrade, if there was one."""
        return self._fleet.plan

    @property
    def table(self) -> RoutingTable:
        """The newest one."""
        return self._board.snapshot.table

    @property
    def _tasks(self) -> list[asyncio.Task[Any]]:
        return [*self._loops, *self._watches.values()]

    @property
    def _fleet(self) -> Fleet:
        return self._board.fleet

    def make_fleet(self, plan: RuntimePlan, *, before: Fleet | None = None) -> Fleet:
        """The fleet of a plan, which takes over what another has."""
        tools = replace(self._tools, pace=replace(self._tools.pace, start_timeout_s=plan.start_timeout_s))
        return Fleet(plan, tools=tools, on_change=self._board.changed.set, on_outgrown=self._relieve, before=before)

    def watch(self, keepers: Iterable[Keeper]) -> None:
        """Have keepers watch their actors from now on."""
        for keeper in keepers:
            self._watches[keeper] = task = asyncio.create_task(keeper.keep())
            task.add_done_callback(_log_failure)

    def release(self, keepers: Iterable[Keeper]) -> None:
        """Have keepers watch their actors no longer."""
        for keeper in keepers:
            self._watches.pop(keeper).cancel()

    def spawn_task(self, work: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Do something in a task that ends with the runtime."""
        task = asyncio.create_task(work)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
        return task

    def _relieve(self, host: HostKeeper, reason: str) -> None:
        self._run(self._changes.relieve(host, reason))

    def _supervise(self) -> None:
        self.watch(self._fleet.keepers)
        self._run(self._board.publish_changes())
        self._run(self._board.callers.forget())
        self._run(Balancing(self._board, self._clock).run())
        if self.plan.lease_s is not None:
            self._run(self._watch_lease())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self.spawn_task(work).add_done_callback(_log_failure)

    async def _describe_layers(self) -> dict[str, Any]:
        routers = ready_handles(self._fleet.routers)[:1]
        for description in await self._board.bounded(router.describe() for router in routers):
            if isinstance(description, dict):
                layers: dict[str, Any] = description.get("layers", {})
                return layers
        return {}

    async def _adopt_routers(self) -> None:
        snapshot, routers = self._board.snapshot, self._fleet.routers
        await self._board.bounded(keeper.place() for keeper in routers)
        for keeper in routers:
            keeper.bound = snapshot.addresses.get(keeper.index)
            # Until it says itself: hosts would forget the key of a router that does not answer just now.
            keeper.public_key = snapshot.public_keys.get(keeper.index)
        here = {keeper.index for keeper in routers}
        self._board.leaving_keys = {i: key for i, key in snapshot.public_keys.items() if i not in here}
        await self._board.bounded(keeper.start(keeper.bound) for keeper in routers if keeper.handle and keeper.bound)

    def _strays(self) -> tuple[list[StrayHost], list[StrayRouter]]:
        """What an upgrade has left behind whose controller died."""
        hosts, routers = self._spawner.others(self.plan)
        return [StrayHost(each, self._clock) for each in hosts], [StrayRouter(each, self._clock) for each in routers]

    async def _watch_lease(self) -> None:
        while (remaining_s := self._lease_until - self._clock.now()) > 0:
            step_s, before = min(remaining_s, _LEASE_STEP_S), self._clock.now()
            await self._clock.sleep(step_s)
            if self._clock.now() - before > step_s + _LEASE_STEP_S:
                # This process stood still: whoever renewed meanwhile could not be heard.
                self.renew()
        _LOG.warning("runtime %s: its lease ran out; tearing it down", self.plan.name)
        # Not in this task, which `close` cancels.
        self._loops.discard(asyncio.current_task())
        await self.close(drain_timeout_s=0.0)


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOG.error("a supervising task of the controller failed", exc_info=error)
