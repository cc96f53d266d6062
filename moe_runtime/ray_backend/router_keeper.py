"""Keeps one router running: Ray restarts its process, this gives it its address again and learns its new key."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import MoERuntimeError, PlacementError, StartError
from moe_runtime.ray_backend.addresses import is_bindable_on, public_address
from moe_runtime.ray_backend.replica_state import ReplicaLife
from moe_runtime.ray_backend.seat import Seat
from moe_runtime.ray_backend.spawner import within
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.placer import ActorDemand
    from moe_runtime.ray_backend.plan import Location, RoutersPlan
    from moe_runtime.ray_backend.seat import Tools
    from moe_runtime.ray_backend.spawner import RouterHandle

_LOG = logging.getLogger(__name__)


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
        return self._handle

    @property
    def _handle(self) -> RouterHandle | None:
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
        self._seat.handle = self._spawner.find_router(self.index)
        try:
            self.location = await self._seat.take(timeout_s)
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
        if self._handle is None or self.location is None:
            raise StartError(f"router {self.index}: expected to be placed before it is started")
        timeout_s = self._pace.start_timeout_s
        try:
            report = await within(self._clock, timeout_s, self._handle.start(address, self._plan))
        except TimeoutError as exc:
            raise StartError(f"router {self.index}: not ready {timeout_s:g} s after its placement") from exc
        except MoERuntimeError as exc:
            raise StartError(f"router {self.index}: {exc}") from exc
        self.bound, self.public_key = report.address, report.public_key
        self._bound_on, self._metrics_address = self.location.node, report.metrics_address
        self.life = self.life.become_ready(self._clock.now())
        self._on_change()

    async def keep(self) -> None:
        """Wait for the router's end and bring it back at its old address, for ever."""
        while True:
            if self.life.state is ReplicaState.READY and self._handle is not None:
                self._fail(await self._handle.wait())
            else:
                await self._bring_up()

    async def end(self, *, drain_timeout_s: float = 0.0) -> None:
        """Drain the router, stop it and end its actor; for a router that nobody keeps any more."""
        if self._handle is not None:
            with contextlib.suppress(TimeoutError):
                if drain_timeout_s > 0:
                    limit_s = drain_timeout_s + self._pace.kill_timeout_s
                    await within(self._clock, limit_s, self._handle.drain(drain_timeout_s))
                await within(self._clock, self._pace.kill_timeout_s, self._handle.stop())
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
            "node": None if self.location is None else self.location.node,
            "pid": None if self.location is None else self.location.pid,
        }

    async def _bring_up(self) -> None:
        if self.life.state is ReplicaState.OUT:
            await self._clock.sleep((self.life.retry_at or 0.0) - self._clock.now())
            self.life = self.life.start_again(self._clock.now())
        try:
            await self.place()
            await self.start(self._next_address())
            self.num_restarts += 1
        except MoERuntimeError as exc:
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
