"""Keeps one router running: Ray restarts its process, this gives it its address again and learns its new key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import MoERuntimeError, PlacementError, StartError
from moe_runtime.ray_backend.addresses import is_bindable_on, public_address
from moe_runtime.ray_backend.health_watch import Finding, Silence, Verdict
from moe_runtime.ray_backend.replica_state import ReplicaLife
from moe_runtime.ray_backend.seat import Seat
from moe_runtime.ray_backend.spawner import AwayError, ends_within, within
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.placer import ActorDemand
    from moe_runtime.ray_backend.plan import Location, RoutersPlan
    from moe_runtime.ray_backend.seat import Tools
    from moe_runtime.ray_backend.spawner import RouterHandle

_LOG = logging.getLogger(__name__)

#: Between two looks for the process that Ray starts in a router's place.
_PAUSE_S = 0.2


class RouterKeeper:
    """One router's life. Owned by the controller's event loop.

    Attributes:
        index: Its place among the routers.
        life: Where it stands.
        location: Where it runs; None until it was first placed.
        bound: The ``host:port`` that it bound first and binds again; None until then.
        public_key: Key of its present process, or of the last one; None where hosts ask for none.
    """

    def __init__(
        self,
        plan: RoutersPlan,
        index: int,
        *,
        tools: Tools,
        new_address: Callable[[Location], str],
        on_change: Callable[[], None],
    ) -> None:
        """Start nothing yet.

        Args:
            plan: The routers to keep alive.
            index: Which of them.
            tools: What all keepers of the runtime work with.
            new_address: The address of a router that comes to a place where others may be.
            on_change: Called when the router needs the table.
        """
        self.index = index
        self.life = ReplicaLife.begin(tools.clock.now())
        self.location: Location | None = None
        self.bound: str | None = None
        self.public_key: str | None = None
        self.num_restarts = 0
        self._metrics_address: str | None = None
        self._plan = plan
        self._spawner = tools.spawner
        self._clock = tools.clock
        self._pace = tools.pace
        self._new_address = new_address
        self._on_change = on_change
        self._bound_on: str | None = None
        #: Where the last process ran that was given up, which may live on for a moment.
        self._ended: Location | None = None
        self._seat: Seat[RouterHandle] = Seat(
            plan.actor(index),
            spawn=lambda node_id: tools.spawner.spawn_router(self._plan, index, node_id=node_id),
            tools=tools,
        )

    @property
    def actor(self) -> ActorDemand:
        """What the actor asks for."""
        return self._seat.actor

    @property
    def handle(self) -> RouterHandle | None:
        """The actor that was found or created last."""
        return self._seat.handle

    @property
    def address(self) -> str | None:
        """Where clients find it; None before it was first started."""
        if self.bound is None or self.location is None:
            return None
        return public_address(self.bound, self.location.ip)

    def follow(self, plan: RoutersPlan, *, new_address: Callable[[Location], str]) -> None:
        """Keep the same router under a newer plan; it learns of it by a snapshot, or when it starts again."""
        self._plan = plan
        self._new_address = new_address

    async def place(self) -> None:
        """Find or create the actor, and wait until it runs somewhere.

        Raises:
            PlacementError: If it runs nowhere in time.
            StartError: If it died.
        """
        timeout_s = self._pace.start_timeout_s
        try:
            self.location = await within(self._clock, timeout_s, self._await_place(timeout_s))
        except TimeoutError as exc:
            unmet = self._spawner.explain(self._plan.demand)
            raise PlacementError(f"router {self.index}: found no place within {timeout_s:g} s: it {unmet}") from exc
        except MoERuntimeError as exc:
            raise StartError(f"router {self.index}: {exc}") from exc

    async def start(self, address: str) -> None:
        """Have a placed router bind and serve; afterwards it is ready.

        Raises:
            StartError: If it could not in time, with its error's text.
        """
        if self.handle is None or self.location is None:
            raise StartError(f"router {self.index}: expected to be placed before it is started")
        timeout_s = self._pace.start_timeout_s
        try:
            report = await within(self._clock, timeout_s, self.handle.start(address, self._plan))
        except TimeoutError as exc:
            raise StartError(f"router {self.index}: not ready {timeout_s:g} s after its placement") from exc
        except MoERuntimeError as exc:
            raise StartError(f"router {self.index}: {exc}") from exc
        self.bound, self.public_key = report.address, report.public_key
        self._bound_on, self._metrics_address = self.location.node, report.metrics_address
        self.life = self.life.become_ready(self._clock.now())
        self._on_change()

    async def keep(self) -> None:
        """Watch the router and bring it back at its old address, for ever."""
        while True:
            if self.life.state in (ReplicaState.READY, ReplicaState.SUSPECT) and self.handle is not None:
                self._fail(await self._watch(self.handle))
            else:
                await self._bring_up()

    async def renew(self, *, drain_timeout_s: float) -> None:
        """Drain the router and give it another process, which is ready at its address when this returns.

        For a router that nobody keeps meanwhile.

        Args:
            drain_timeout_s: How long its requests may take; with what is left it ends.

        Raises:
            StartError: If it is not ready again in time. Whoever keeps it from then on brings it back.
        """
        handle = self.handle
        if handle is not None and self.life.state in (ReplicaState.READY, ReplicaState.SUSPECT):
            await self._drain(handle, drain_timeout_s)
            await self._restart(handle)
            self._fail("it is restarted on purpose")
        deadline = self._clock.now() + self._pace.start_timeout_s
        while self.life.state is not ReplicaState.READY:
            if self._clock.now() >= deadline:
                raise StartError(f"router {self.index}: not ready again in time: {self.life.reason}")
            await self._bring_up()

    async def end(self, *, drain_timeout_s: float = 0.0) -> None:
        """Drain the router, stop it and end its actor; for a router that nobody keeps any more."""
        if self.handle is not None:
            await self._drain(self.handle, drain_timeout_s)
        await self._seat.leave()

    def describe(self) -> dict[str, Any]:
        """State, place and history, as plain values."""
        return {
            "index": self.index,
            "state": str(self.life.state),
            "reason": self.life.reason,
            "address": self.address,
            "metrics_address": self._metrics_address,
            "num_restarts": self.num_restarts,
            "num_failures": self.life.num_failures,
            "node": None if self.location is None else self.location.node,
            "pid": None if self.location is None else self.location.pid,
        }

    async def _await_place(self, timeout_s: float) -> Location:
        """Where its next process runs, after Ray has noticed the end of the last one."""
        while True:
            self._seat.handle = self._spawner.find_router(self.index)
            with contextlib.suppress(AwayError):
                location = await self._seat.take(timeout_s)
                if location != self._ended:
                    return location
            await self._clock.sleep(_PAUSE_S)

    async def _drain(self, handle: RouterHandle, drain_timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            if drain_timeout_s > 0:
                await within(self._clock, drain_timeout_s + self._pace.kill_timeout_s, handle.drain(drain_timeout_s))
            await within(self._clock, self._pace.kill_timeout_s, handle.stop())

    async def _restart(self, handle: RouterHandle) -> None:
        self._ended = self.location
        await handle.restart()

    async def _watch(self, handle: RouterHandle) -> str:
        """Return the reason when the router is gone, or when it stands still and was killed."""
        silence = Silence(self._pace)
        death = asyncio.ensure_future(handle.wait())
        try:
            while not await ends_within(self._clock, self._pace.ping_every_s, death):
                verdict = await self._ping(handle, silence)
                if verdict.finding is Finding.LOST:
                    await self._restart(handle)
                    return verdict.reason or "it stands still"
                self._take(verdict)
            return death.result()
        finally:
            death.cancel()

    async def _ping(self, handle: RouterHandle, silence: Silence) -> Verdict:
        timeout_s = self._pace.ping_timeout_s
        try:
            still = await within(self._clock, timeout_s, handle.ping())
        except TimeoutError:
            still = f"no answer within {timeout_s:g} s"
        except MoERuntimeError as exc:
            still = str(exc)
        if still is not None:
            return silence.judge(self._clock.now(), still)
        silence.end()
        return Verdict(Finding.FIT)

    def _take(self, verdict: Verdict) -> None:
        now = self._clock.now()
        if verdict.finding is not Finding.FIT:
            self.life = self.life.become_suspect(now, verdict.reason or verdict.finding)
        elif self.life.state is ReplicaState.SUSPECT:
            self.life = self.life.become_ready(now)

    async def _bring_up(self) -> None:
        if self.life.state is ReplicaState.OUT:
            await self._clock.sleep((self.life.retry_at or 0.0) - self._clock.now())
            self.life = self.life.start_again(self._clock.now())
        try:
            await self.place()
            await self.start(self._next_address())
            self.num_restarts += 1
        except MoERuntimeError as exc:
            if isinstance(exc.__cause__, TimeoutError) and self.bound is not None and self.handle is not None:
                # It has run before, so it does not wait for a place: its process hangs.
                await self._restart(self.handle)
            self._fail(str(exc).removeprefix(f"router {self.index}: "))

    def _next_address(self) -> str:
        """The old address where it can be bound, since clients know it; on another node a new one."""
        if self.location is None:
            raise StartError(f"router {self.index}: expected to be placed before it is started")
        is_at_home = self._bound_on in (None, self.location.node)
        if self.bound is not None and is_at_home and is_bindable_on(self.bound, self._plan.address, self.location.ip):
            return self.bound
        return self._new_address(self.location)

    def _fail(self, reason: str) -> None:
        _LOG.warning("router %d is out: %s", self.index, reason)
        self.life = self.life.go_out(self._clock.now(), reason, self._pace.backoff)
