"""Keeps one expert host alive: places it, starts it, watches it, and brings it back under a new incarnation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import MoERuntimeError, PlacementError, StartError
from moe_runtime.ray_backend.health_watch import Drain, Finding, HealthRules, HealthWatch
from moe_runtime.ray_backend.replica_state import ReplicaLife
from moe_runtime.ray_backend.seat import Seat
from moe_runtime.ray_backend.spawner import ends_within, within
from moe_runtime.service.routing_table import Replica, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_runtime.ray_backend.health_watch import Verdict
    from moe_runtime.ray_backend.placer import ActorDemand
    from moe_runtime.ray_backend.plan import HostHealth, HostPlan, HostReport, Location, ReplicaPlan
    from moe_runtime.ray_backend.seat import Tools
    from moe_runtime.ray_backend.spawner import HostHandle

_LOG = logging.getLogger(__name__)


class HostKeeper:
    """One host's life. Owned by the controller's event loop.

    Attributes:
        plan: What to keep alive.
        life: Where the host stands.
        location: Where it runs; None until it was first placed.
        num_restarts: How often it came back.
    """

    def __init__(
        self,
        plan: HostPlan,
        *,
        tools: Tools,
        threads_on: Callable[[Location], int],
        on_change: Callable[[], None],
        on_outgrown: Callable[[HostKeeper, str], None],
    ) -> None:
        """Start nothing yet.

        Args:
            plan: What to keep alive.
            tools: What all keepers of the runtime work with.
            threads_on: Torch threads of a host at a location.
            on_change: Called whenever the routing table has to change.
            on_outgrown: Called with the reason when the host should have a successor; ``drain`` is for where none can
                stand beside it.
        """
        self.plan = plan
        self._who = f"expert host {plan.host_id}"
        self.life = ReplicaLife.begin(tools.clock.now())
        self.location: Location | None = None
        self.num_restarts = 0
        self._spawner = tools.spawner
        self._clock = tools.clock
        self._pace = tools.pace
        self._threads_on = threads_on
        self._on_change = on_change
        self._on_outgrown = on_outgrown
        self._seat: Seat[HostHandle] = Seat(
            replace(plan.actor, actor_id=plan.key),
            # The plan of that time: a newer one may have changed where it is in its layer.
            spawn=lambda node_id: tools.spawner.spawn_host(self.plan, node_id=node_id),
            tools=tools,
        )
        self._report: HostReport | None = None
        self._admitted: frozenset[str] = frozenset()
        self._health: HostHealth | None = None
        self._finding = Finding.FIT
        self._drain: Drain | None = None

    @property
    def actor(self) -> ActorDemand:
        """What the actor asks for."""
        return self._seat.actor

    @property
    def handle(self) -> HostHandle | None:
        """The actor that was placed last."""
        return self._seat.handle

    def follow(self, plan: HostPlan, *, threads_on: Callable[[Location], int]) -> None:
        """Keep the same host under a newer plan, which may give its experts other places in their layer."""
        self.plan = plan
        self._threads_on = threads_on

    def find(self) -> bool:
        """Take over the living actor of this host, if there is one; whether there is."""
        self._seat.handle = self._spawner.find_host(self.plan)
        return self.handle is not None

    async def place(self) -> None:
        """Create the actor, unless one was found, and wait until it runs somewhere.

        Raises:
            PlacementError: If the cluster has no room for it in time.
            StartError: If it died.
        """
        timeout_s = self._pace.start_timeout_s
        try:
            self.location = await self._seat.take(timeout_s)
        except TimeoutError as exc:
            unmet = self._spawner.explain(self.plan.demand)
            raise PlacementError(f"{self._who}: found no place within {timeout_s:g} s: it {unmet}") from exc
        except MoERuntimeError as exc:
            raise StartError(f"{self._who}: {exc}") from exc

    async def start(self) -> None:
        """Build the experts of a placed host; afterwards it is ready.

        Raises:
            StartError: If an expert could not be built in time, with its error's text.
        """
        if self.handle is None or self.location is None:
            raise StartError(f"{self._who}: expected to be placed before it is started")
        timeout_s = self._pace.start_timeout_s
        num_threads = self._threads_on(self.location)
        # Which node matters: it may be the one that lacks a plug-in or a weight file.
        where = f"{self._who} on node {self.location.node}"
        try:
            self._report = await within(self._clock, timeout_s, self.handle.start(num_threads))
        except TimeoutError as exc:
            raise StartError(f"{where}: not ready {timeout_s:g} s after its placement") from exc
        except MoERuntimeError as exc:
            raise StartError(f"{where}: {exc}") from exc
        # A new process knows nobody; of one that was found it is not known.
        self._admitted = frozenset()
        self._change(self.life.become_ready(self._clock.now()))

    def has_to_admit(self, public_keys: frozenset[str]) -> bool:
        """Whether the host is ready, and does not yet let in just the routers with these keys."""
        is_ready = self.handle is not None and self.life.state is ReplicaState.READY
        return is_ready and self._admitted != public_keys

    async def admit(self, public_keys: frozenset[str]) -> None:
        """Have a ready host let in the routers with these keys; where it does not, it is suspect."""
        handle = self.handle
        if handle is None:
            return
        try:
            await within(self._clock, self._pace.ping_timeout_s, handle.admit(public_keys))
        except (TimeoutError, MoERuntimeError) as exc:
            if handle is self.handle and self.life.state is ReplicaState.READY:
                self._change(self.life.become_suspect(self._clock.now(), f"it did not admit the routers: {exc}"))
        else:
            if handle is self.handle:
                self._admitted = public_keys

    def drain(self) -> None:
        """Have a host that serves leave the table, finish what it has, and then start again."""
        if self.life.state is ReplicaState.SUSPECT and self._drain is None:
            self._drain = Drain(self._clock.now() + self._pace.drain_timeout_s)
            self._change(self.life.become_suspect(self._clock.now(), f"it drains: {self.life.reason}"))

    async def adopt(self) -> None:
        """Take over the living actor of this host if there is one; otherwise, or if it fails, leave it starting."""
        if self.find():
            await self._place_and_start()

    async def keep(self) -> None:
        """Watch the host and bring it back, for ever; first brings it up if it is not."""
        while True:
            if self.life.state in (ReplicaState.STARTING, ReplicaState.OUT):
                await self._bring_up()
            else:
                await self._fail(await self._watch())

    async def end(self) -> None:
        """Stop the host, end its actor, and remove what it leaves behind; for a host that nobody keeps any more."""
        await self._stop()
        await self._seat.leave()
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what the host that was ready last left behind; for when it is dead, or killed."""
        if self._report is not None:
            self._spawner.clean_up(self._report.endpoint)

    def replicas(self) -> Iterator[tuple[ReplicaPlan, Replica]]:
        """What the routing table says of this host; nothing before it was first ready, and while it drains.

        Routers go on with what they have sent to a host that is not in the table, and give up what is with one that is
        out.
        """
        if self._report is None or self.location is None or self._drain is not None:
            return
        for plan in self.plan.replicas:
            yield (
                plan,
                Replica(
                    replica_id=plan.replica_id,
                    endpoint=self._report.endpoint,
                    state=self.life.state,
                    weights_version=self._report.weights_versions.get(plan.replica_id, ""),
                    device=self._report.device,
                    pid=self.location.pid,
                    num_restarts=self.num_restarts,
                    reason=self.life.reason,
                ),
            )

    def describe(self) -> dict[str, Any]:
        """State, place and history, as plain values."""
        return {
            "host_id": self.plan.host_id,
            "key": self.plan.key,
            "state": str(self.life.state),
            "reason": self.life.reason,
            "retry_in_s": None if self.life.retry_at is None else max(0.0, self.life.retry_at - self._clock.now()),
            "num_restarts": self.num_restarts,
            "num_failures": self.life.num_failures,
            "health": None if self._health is None else asdict(self._health),
            "node": None if self.location is None else self.location.node,
            "pid": None if self.location is None else self.location.pid,
            "num_threads": None if self._report is None else self._report.num_threads,
            "replicas": [replica.replica_id for replica in self.plan.replicas],
        }

    async def _bring_up(self) -> None:
        if self.life.state is ReplicaState.OUT:
            await self._clock.sleep((self.life.retry_at or 0.0) - self._clock.now())
            self._change(self.life.start_again(self._clock.now()))
        self.num_restarts += await self._place_and_start()

    async def _place_and_start(self) -> bool:
        """Whether it is ready now; otherwise it is out."""
        try:
            await self.place()
            await self.start()
        except MoERuntimeError as exc:
            await self._fail(str(exc).removeprefix(self._who).removeprefix(":").strip())
            return False
        return True

    async def _watch(self) -> str:
        """Return the reason when the host is lost, or drained; meanwhile pings make it suspect and ready again."""
        if (handle := self.handle) is None:
            return "it has no actor"
        death, watch = asyncio.ensure_future(handle.wait()), HealthWatch(self._pace)
        try:
            while not await ends_within(self._clock, self._pace.ping_every_s, death):
                verdict = await self._ping(handle, watch)
                if verdict.finding is Finding.LOST:
                    return verdict.reason or "it is lost"
                if self._drain is None:
                    self._take(verdict)
                elif self._drain.is_over(self._health, self._clock.now()):
                    await self._stop()
                    return self.life.reason or "it was drained"
            return death.result()
        finally:
            death.cancel()

    async def _ping(self, handle: HostHandle, watch: HealthWatch) -> Verdict:
        try:
            self._health = await within(self._clock, self._pace.ping_timeout_s, handle.ping())
        except TimeoutError:
            return watch.no_answer(self._clock.now(), f"no answer within {self._pace.ping_timeout_s:g} s")
        except MoERuntimeError as exc:
            return watch.no_answer(self._clock.now(), str(exc))
        rules = HealthRules(self._pace, self.plan.max_forward_s, self.plan.demand.max_rss_bytes)
        return watch.answer(self._health, rules)

    def _take(self, verdict: Verdict) -> None:
        """Follow a finding that does not end the host."""
        before, self._finding = self._finding, verdict.finding
        if verdict.finding is Finding.FIT:
            if self.life.state is ReplicaState.SUSPECT:
                self._change(self.life.become_ready(self._clock.now()))
        elif self.life.state is ReplicaState.READY or verdict.finding is not before:
            reason = verdict.reason or verdict.finding
            self._change(self.life.become_suspect(self._clock.now(), reason))
            if verdict.finding is Finding.OUTGROWN:
                self._on_outgrown(self, reason)

    async def _stop(self) -> None:
        if self.handle is not None:
            with contextlib.suppress(TimeoutError):
                await within(self._clock, self._pace.kill_timeout_s, self.handle.stop())

    async def _fail(self, reason: str) -> None:
        _LOG.warning("%s is out: %s", self._who, reason)
        self._drain, self._finding, self._health = None, Finding.FIT, None
        self._change(self.life.go_out(self._clock.now(), reason, self._pace.backoff))
        await self._seat.leave()
        self.clean_up()
        self._spawner.sweep()

    def _change(self, life: ReplicaLife) -> None:
        self.life = life
        self._on_change()
