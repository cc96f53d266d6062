"""How soon a cluster gets over one fault at a time: noticed, answered by others, back."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.chaos.cluster import host_is_back, router_is_back
from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.faulty_expert import SLOW_S, Poison
from moe_runtime.chaos.host_watch import HostWatch, is_listening
from moe_runtime.chaos.layer import LAYER
from moe_runtime.chaos.ledger import Ending
from moe_runtime.chaos.load import Asker
from moe_runtime.chaos.questions import draw_poisoned, draw_small
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.wire.messages import RequestOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moe_runtime.chaos.cluster import Cluster
    from moe_runtime.chaos.lag import Lag
    from moe_runtime.chaos.ledger import Outcome
    from moe_runtime.chaos.questions import Question
    from moe_runtime.chaos.reference import Reference
    from moe_runtime.chaos.storm import Storm

#: An expert has two replicas, so half of the kills hit the one that works.
_NUM_EXPERT_KILLS, _NUM_ROUTER_KILLS = 8, 4
#: From the question that keeps an expert busy to the kill.
_KILL_AFTER_S = 0.15 * SLOW_S
#: An answer that took so much longer than its expert sleeps was not the first host's.
_UNDISTURBED_S = 0.12 * SLOW_S
_WHOLE_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.1
#: How long a client is watched after a router was killed.
_FAILOVER_WATCH_S = 3.0


async def measure_recovery(
    cluster: Cluster, storm: Storm, *, seed: int, reference: Reference, times_s: dict[str, list[float]]
) -> None:
    """Enter times in seconds, by what they measure; the cluster must be whole, and is left so.

    ``kill_to_noticed``: SIGKILL of an expert host to a router's end of the data plane knowing it.
    ``kill_to_other_answer``: SIGKILL of a host that works on a request to that request's answer by another replica or
    another expert, less the time for which that one sleeps over it, too. ``kill_to_dropped_answer``: the same where
    the assignment was dropped instead. Neither where a twin was asked before.
    ``kill_to_back``: SIGKILL to the successor's being ready.
    ``router_failover``: the longest time for which a client that knows both routers is without an answer after one
    was killed; it asks all the time. ``router_back``: SIGKILL of a router to its successor's being ready.
    Every answer is checked and entered in the storm's ledger.

    Args:
        cluster: What is broken and watched.
        storm: The one that is over; its ledger goes on.
        seed: Of the requests.
        reference: Checks the answers.
        times_s: Where the times go, one after the other.

    Raises:
        ChaosError: If a part does not answer, or does not come back.
    """
    measuring = _Measuring(cluster, storm, seed=seed, reference=reference, times_s=times_s)
    lag = asyncio.create_task(storm.lag.run())
    try:
        for turn in range(_NUM_EXPERT_KILLS):
            await measuring.kill_expert(turn)
        for turn in range(_NUM_ROUTER_KILLS):
            await measuring.kill_router(turn)
    finally:
        lag.cancel()


class _Measuring:
    def __init__(
        self,
        cluster: Cluster,
        storm: Storm,
        *,
        seed: int,
        reference: Reference,
        times_s: dict[str, list[float]],
    ) -> None:
        self._cluster = cluster
        self._storm = storm
        self._lag: Lag = storm.lag
        self._reference = reference
        self._rng = np.random.default_rng([seed, 0x2EC])
        self._times_s = times_s

    async def kill_expert(self, turn: int) -> None:
        """Kill one of two replicas while one of them is at work on a request."""
        question, expert_id = self._slow_question()
        # A router may still describe a host that is gone.
        await self._until(lambda: is_listening(self._replica(expert_id, turn)))
        replica = self._replica(expert_id, turn)
        host = next(host for host in self._cluster.hosts() if host["pid"] == replica["pid"])
        async with AsyncMoEClient(self._cluster.addresses[0]) as client:
            asker = self._asker(client)
            # The connection is made by a question that does not count.
            await asker.ask(draw_small(self._rng))
            with await asyncio.to_thread(HostWatch, replica) as watch:
                noticing = asyncio.create_task(asyncio.to_thread(watch.wait_for_loss))
                asked_at = time.monotonic()
                asking = asyncio.create_task(asker.ask(question))
                await asyncio.sleep(_KILL_AFTER_S)
                killed_at = self._kill(replica["pid"])
                self._note("kill_to_noticed", await noticing - killed_at)
                outcome = await asking
        if outcome is not None:
            self._note_answer(outcome, asked_at=asked_at, killed_at=killed_at)
        is_back = host_is_back(host["host_id"], host["pid"])
        self._note("kill_to_back", await self._until(lambda: is_back(self._cluster.description)) - killed_at)
        await self._until(lambda: self._cluster.is_whole)

    async def kill_router(self, turn: int) -> None:
        """Kill one of two routers under a client that knows both and asks all the time."""
        routers = self._cluster.routers()
        victim = routers[turn % len(routers)]
        answered_at: list[float] = []
        async with AsyncMoEClient(self._cluster.addresses) as client:
            asker, stopping = self._asker(client), asyncio.Event()

            async def ask_all_the_time() -> None:
                while not stopping.is_set():
                    outcome = await asker.ask(draw_small(self._rng))
                    if outcome is not None and outcome.ending is Ending.OK:
                        answered_at.append(time.monotonic())

            asking = asyncio.create_task(ask_all_the_time())
            await asyncio.sleep(_KILL_AFTER_S)
            killed_at = self._kill(victim["pid"])
            await asyncio.sleep(_FAILOVER_WATCH_S)
            stopping.set()
            await asking
        moments = [killed_at, *(moment for moment in answered_at if moment > killed_at)]
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        self._note("router_failover", max(gaps, default=_FAILOVER_WATCH_S))
        is_back = router_is_back(victim["index"], victim["pid"])
        self._note("router_back", await self._until(lambda: is_back(self._cluster.description)) - killed_at)
        await self._until(lambda: self._cluster.is_whole)

    def _note_answer(self, outcome: Outcome, *, asked_at: float, killed_at: float) -> None:
        """Enter how long an answer took after the kill, if it was the killed replica's to give."""
        if outcome.report is None:
            return
        after_kill_s = asked_at + outcome.elapsed_s - killed_at
        if outcome.report.num_dropped_failure:
            self._note("kill_to_dropped_answer", after_kill_s)
        elif outcome.elapsed_s > SLOW_S + _UNDISTURBED_S and not outcome.report.num_hedged:
            self._note("kill_to_other_answer", after_kill_s - SLOW_S)

    def _note(self, name: str, seconds: float) -> None:
        self._times_s.setdefault(name, []).append(seconds)

    def _slow_question(self) -> tuple[Question, int]:
        """One row for one expert, which sleeps over it; and that expert."""
        question = draw_poisoned(self._rng, Poison.SLOW, num_rows=1)
        question = replace(question, k=np.ones(1, dtype=np.int64), options=RequestOptions(k=1))
        routing, _ = self._reference.routing(question.inputs, question.k)
        return question, int(routing.expert_ids[0])

    def _replica(self, expert_id: int, turn: int) -> Mapping[str, Any]:
        replicas = self._cluster.description["layers"][LAYER]["experts"][expert_id]["replicas"]
        replica: Mapping[str, Any] = replicas[turn % len(replicas)]
        return replica

    def _asker(self, client: AsyncMoEClient) -> Asker:
        return Asker(client, ledger=self._storm.ledger, reference=self._reference, lag=self._lag)

    def _kill(self, pid: int) -> float:
        """Kill a process; when."""
        killed_at = time.monotonic()
        if not self._cluster.send_signal(pid, signal.SIGKILL):
            raise ChaosError(f"process {pid}: expected a part of the cluster to kill, found none")
        self._storm.injector.num_kills += 1
        return killed_at

    async def _until(self, is_so: Callable[[], bool]) -> float:
        """When something about the cluster has become so, by ``time.monotonic``."""
        give_up_at = time.monotonic() + _WHOLE_WITHIN_S
        while True:
            await self._cluster.look()
            if is_so():
                return time.monotonic()
            if time.monotonic() > give_up_at:
                raise ChaosError(f"expected the cluster to be whole again within {_WHOLE_WITHIN_S:g} s, found it not")
            await asyncio.sleep(_LOOK_EVERY_S)
