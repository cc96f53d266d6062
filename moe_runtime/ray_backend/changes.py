"""Changes of a runtime that runs, one after the other: to another plan, or to other processes of the same."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moe_runtime.errors import MoERuntimeError, StartError
from moe_runtime.ray_backend.retirement import Retirement
from moe_runtime.ray_backend.roll import ChangedMeanwhileError, Roll, Upgraded, check_fixed, completed, is_same, renewed
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from moe_runtime.ray_backend.board import Board
    from moe_runtime.ray_backend.fleet import Fleet, Keeper
    from moe_runtime.ray_backend.host_keeper import HostKeeper
    from moe_runtime.ray_backend.plan import RuntimePlan
    from moe_runtime.ray_backend.retirement import StrayHost, StrayRouter
    from moe_runtime.ray_backend.router_keeper import RouterKeeper
    from moe_runtime.ray_backend.spawner import AsyncClock

_LOG = logging.getLogger(__name__)

#: How long a router that has restarted may take to route by the newest table.
_FOLLOW_TIMEOUT_S = 10.0
_POLL_EVERY_S = 0.05
#: How long clients may take to find out that a router is back; their channels try again every second.
_NOTICE_S = 2.0

ResultT = TypeVar("ResultT")


class Supervisor(Protocol):
    """Whoever keeps the actors of a runtime; the controller."""

    def make_fleet(self, plan: RuntimePlan, *, before: Fleet | None) -> Fleet:
        """The fleet of a plan, which takes over what another has."""
        ...

    def watch(self, keepers: Iterable[Keeper]) -> None:
        """Have keepers watch their actors from now on."""
        ...

    def release(self, keepers: Iterable[Keeper]) -> None:
        """Have keepers watch their actors no longer."""
        ...

    def spawn_task(self, work: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        """Do something in a task that ends with the runtime."""
        ...


@dataclass(frozen=True)
class Restarted:
    """What a rolling restart has done.

    Attributes:
        hosts: Ids of the expert hosts that have another process now.
        num_routers: Routers that have.
    """

    hosts: tuple[str, ...] = ()
    num_routers: int = 0


@dataclass(frozen=True)
class RestartTerms:
    """What whoever asks for a restart has to know; the same terms may be asked for again, to finish what was begun.

    Attributes:
        generation: Of the successors of all hosts.
        timeout_s: How long it may take.
    """

    generation: int
    timeout_s: float


class Changes:
    """Makes the changes of one runtime. Owned by the controller's event loop."""

    def __init__(self, board: Board, clock: AsyncClock, *, supervisor: Supervisor) -> None:
        """Change nothing yet."""
        self._board = board
        self._clock = clock
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()
        self._roll: Roll | None = None
        self._relieved: set[str] = set()

    @property
    def coming(self) -> Fleet:
        """The fleet that there will be."""
        return self._board.fleet if self._roll is None else self._roll.coming

    def describe(self) -> dict[str, Any] | None:
        """How far the change that is under way is, as plain values; None where none is."""
        return None if self._roll is None else self._roll.describe()

    async def upgrade(self, plan: RuntimePlan, *, instead_of: bytes | None) -> Upgraded:
        """Roll to another plan; see ``Controller.upgrade``."""
        async with self._one_at_a_time:
            running = self._plan
            if instead_of is not None and running.source != instead_of:
                raise ChangedMeanwhileError(f"runtime {running.name}: it was changed meanwhile")
            check_fixed(running, plan)
            plan = completed(running, plan)
            if is_same(running, plan):
                return Upgraded(kept=tuple(host.host_id for host in plan.hosts), num_routers=plan.routers.count)
            return await self._until_ended(self._roll_to(plan), "its upgrade")

    def restart_terms(self) -> RestartTerms:
        """Of a restart that begins now."""
        plan = self._plan
        per_host_s = 2 * plan.start_timeout_s + plan.routers.let_go_s
        per_router_s = plan.routers.let_go_s + plan.start_timeout_s + _FOLLOW_TIMEOUT_S
        timeout_s = len(plan.hosts) * per_host_s + plan.routers.count * per_router_s
        return RestartTerms(plan.next_generation, timeout_s)

    async def restart(self, *, generation: int, routers: bool) -> Restarted:
        """Give hosts of an earlier generation, and then routers, other processes; see ``Controller.restart``."""
        async with self._one_at_a_time:
            return await self._until_ended(self._restart(generation, routers=routers), "its restart")

    async def relieve(self, host: HostKeeper, reason: str) -> None:
        """Replace a host that works but should not go on: by a successor beside it, or else after it has drained."""
        key = host.plan.key
        if key in self._relieved:
            return
        self._relieved.add(key)
        try:
            async with self._one_at_a_time:
                # It may have been replaced, or have ended, while another change was made.
                if host in self._board.fleet.hosts and host.life.state is ReplicaState.SUSPECT:
                    await self._relieve(host, reason)
        finally:
            self._relieved.discard(key)

    async def retire_strays(
        self, hosts: Sequence[StrayHost], routers: Sequence[StrayRouter]
    ) -> Coroutine[Any, Any, None]:
        """Take the first turn, and get what is to be done in it: to end what an earlier change has left behind."""
        # Before any other change, which may need their names.
        await self._one_at_a_time.acquire()
        return self._retire(hosts, routers)

    @property
    def _plan(self) -> RuntimePlan:
        return self._board.fleet.plan

    async def _retire(self, hosts: Sequence[StrayHost], routers: Sequence[StrayRouter]) -> None:
        version, let_go_s = self._board.snapshot.table.version, self._plan.routers.let_go_s
        try:
            await Retirement(self._board, self._clock).run(hosts, routers, version=version, let_go_s=let_go_s)
        finally:
            self._one_at_a_time.release()

    async def _until_ended(self, work: Coroutine[Any, Any, ResultT], what: str) -> ResultT:
        """The result of a change; an end of the runtime cancels it."""
        task = self._supervisor.spawn_task(work)
        try:
            return await task
        except asyncio.CancelledError as exc:
            if task.cancelled():
                raise StartError(f"runtime {self._plan.name}: it was ended before {what} was") from exc
            raise

    async def _roll_to(self, plan: RuntimePlan) -> Upgraded:
        self._roll = Roll(
            self._supervisor.make_fleet(plan, before=self._board.fleet),
            board=self._board,
            clock=self._clock,
            supervise=self._supervisor.watch,
            release=self._supervisor.release,
        )
        try:
            return await self._roll.run()
        finally:
            self._roll = None

    async def _restart(self, generation: int, *, routers: bool) -> Restarted:
        # One by one: there need not be room for all of them twice.
        hosts = [host.host_id for host in self._plan.hosts if host.generation < generation]
        for host_id in hosts:
            await self._roll_to(renewed(self._plan, host_id, generation=generation))
        keepers = list(self._board.fleet.routers) if routers else []
        for place, keeper in enumerate(keepers):
            if place:
                await self._clock.sleep(_NOTICE_S)
            await self._restart_router(keeper)
        return Restarted(tuple(hosts), len(keepers))

    async def _restart_router(self, keeper: RouterKeeper) -> None:
        self._supervisor.release([keeper])
        try:
            await keeper.renew(drain_timeout_s=self._plan.routers.let_go_s)
        finally:
            self._supervisor.watch([keeper])
        deadline = self._clock.now() + _FOLLOW_TIMEOUT_S
        # Clients go to it as soon as it listens; the next one must not leave before it routes.
        while not await self._follows(keeper) and self._clock.now() < deadline:
            await self._clock.sleep(_POLL_EVERY_S)

    async def _follows(self, keeper: RouterKeeper) -> bool:
        handles = [] if keeper.handle is None else [keeper.handle]
        found = await self._board.bounded(handle.oldest_table_version() for handle in handles)
        return any(isinstance(version, int) and version > 0 for version in found)

    async def _relieve(self, host: HostKeeper, reason: str) -> None:
        plan = self._plan
        if not self._board.fleet.has_twin(host):
            try:
                await self._roll_to(renewed(plan, host.plan.host_id, generation=plan.next_generation))
            except MoERuntimeError as exc:
                _LOG.warning("%s: no successor could stand beside it: %s", host.plan.host_id, exc)
            else:
                _LOG.warning("%s: its successor has taken its place: %s", host.plan.host_id, reason)
                return
        host.drain()
