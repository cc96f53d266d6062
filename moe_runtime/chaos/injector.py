"""Does to a cluster what the schedule says."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.chaos.cluster import controller_is_back, host_is_back, router_is_back
from moe_runtime.chaos.faulty_expert import Poison
from moe_runtime.chaos.questions import draw_flooding, draw_poisoned
from moe_runtime.chaos.schedule import FaultKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from moe_runtime.chaos.cluster import Cluster
    from moe_runtime.chaos.load import Load
    from moe_runtime.chaos.schedule import Fault

#: Requests of one flood: twice what the queues of both routers hold.
FLOOD_REQUESTS = 64
_POISON = {
    FaultKind.SLOW: Poison.SLOW,
    FaultKind.POISON_RAISE: Poison.RAISE,
    FaultKind.POISON_NAN: Poison.NAN,
    FaultKind.POISON_EXIT: Poison.EXIT,
    FaultKind.POISON_HANG: Poison.HANG,
}
_ROUTER_KINDS = (FaultKind.KILL_ROUTER, FaultKind.FREEZE_ROUTER)


class Injector:
    """Brings faults to a cluster under load.

    Attributes:
        num_faults: Faults that found a victim, by kind.
        num_kills: Processes that were killed by a signal.
        last_router_fault_at: When a router was last killed, frozen or thawed.
    """

    def __init__(self, cluster: Cluster, load: Load, *, seed: int) -> None:
        """Do nothing yet."""
        self._cluster = cluster
        self._load = load
        self._rng = np.random.default_rng([seed, 0xFA])
        self._frozen: set[int] = set()
        self._stopping = asyncio.Event()
        self.num_faults: Counter[FaultKind] = Counter()
        self.num_kills = 0
        self.last_router_fault_at = float("-inf")

    async def run(self, schedule: Sequence[Fault], *, started_at: float) -> None:
        """Bring every fault in its time, until ``stop``; returns when the last is over and nothing is frozen."""
        under_way: list[asyncio.Task[None]] = []
        for fault in schedule:
            await self._pause(started_at + fault.at_s - time.monotonic())
            if self._stopping.is_set():
                break
            # Not awaited: what is frozen, or answers slowly, does not hold up the next fault.
            under_way.append(asyncio.create_task(self.bring(fault)))
        await asyncio.gather(*under_way)

    def stop(self) -> None:
        """Begin no more faults, and thaw what is frozen."""
        self._stopping.set()

    async def bring(self, fault: Fault) -> None:
        """Do one thing; returns when it is over."""
        actions: dict[FaultKind, Callable[[Fault], Awaitable[bool]]] = {
            FaultKind.KILL_EXPERT: self._kill_expert,
            FaultKind.FREEZE_EXPERT: self._freeze,
            FaultKind.KILL_ROUTER: self._kill_router,
            FaultKind.FREEZE_ROUTER: self._freeze,
            FaultKind.KILL_CONTROLLER: self._kill_controller,
            FaultKind.FLOOD: self._flood,
        }
        if fault.kind in _ROUTER_KINDS:
            self.last_router_fault_at = time.monotonic()
        if await actions.get(fault.kind, self._poison)(fault):
            self.num_faults[fault.kind] += 1
        if fault.kind in _ROUTER_KINDS:
            self.last_router_fault_at = time.monotonic()

    async def _kill_expert(self, fault: Fault) -> bool:
        # The next one where the target is away already.
        for victim in _from(self._cluster.hosts(), fault.target):
            if victim["pid"] not in self._frozen and self._kill(victim["pid"]):
                self._cluster.await_back(fault.kind, host_is_back(victim["host_id"], victim["pid"]))
                return True
        return False

    async def _kill_router(self, fault: Fault) -> bool:
        routers = self._cluster.routers()
        victim = routers[fault.target % len(routers)]
        others_serve = any(router["state"] == "ready" for router in routers if router is not victim)
        if not others_serve or not self._kill(victim["pid"]):
            return False
        self._cluster.await_back(fault.kind, router_is_back(victim["index"], victim["pid"]))
        return True

    async def _kill_controller(self, fault: Fault) -> bool:
        pid = self._cluster.controller_pid
        if not self._kill(pid):
            return False
        self._cluster.await_back(fault.kind, controller_is_back(pid))
        return True

    async def _freeze(self, fault: Fault) -> bool:
        parts = self._cluster.routers() if fault.kind is FaultKind.FREEZE_ROUTER else self._cluster.hosts()
        pids = [part["pid"] for part in _from(parts, fault.target) if part["pid"] not in self._frozen]
        pid = next((pid for pid in pids if self._cluster.send_signal(pid, signal.SIGSTOP)), None)
        if pid is None:
            return False
        self._frozen.add(pid)
        try:
            await self._pause(fault.duration_s)
        finally:
            self._cluster.send_signal(pid, signal.SIGCONT)
            self._frozen.discard(pid)
        return True

    async def _poison(self, fault: Fault) -> bool:
        await self._load.may_ask()
        asker = self._load.askers[fault.target % len(self._load.askers)]
        await asker.ask(draw_poisoned(self._rng, _POISON[fault.kind]))
        return True

    async def _flood(self, fault: Fault) -> bool:
        await self._load.may_ask()
        askers, first = self._load.askers, fault.target
        questions = [draw_flooding(self._rng) for _ in range(FLOOD_REQUESTS)]
        await asyncio.gather(*(askers[(first + i) % len(askers)].ask(each) for i, each in enumerate(questions)))
        return True

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), max(0.0, seconds))

    def _kill(self, pid: int | None) -> bool:
        is_hit = self._cluster.send_signal(pid, signal.SIGKILL)
        self.num_kills += is_hit
        return is_hit


def _from(parts: Sequence[dict[str, Any]], target: int) -> list[dict[str, Any]]:
    """The parts in turn, the target first."""
    first = target % len(parts)
    return [*parts[first:], *parts[:first]]
