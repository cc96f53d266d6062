"""The middle of a run: load, faults and settlements against a cluster that serves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.chaos.counters import Comparison, CounterReader, comparison_of, mistakes_in_counters
from moe_runtime.chaos.footprint import FootprintMeter
from moe_runtime.chaos.injector import Injector
from moe_runtime.chaos.lag import Lag
from moe_runtime.chaos.ledger import Ledger
from moe_runtime.chaos.load import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_runtime.chaos.cluster import Cluster
    from moe_runtime.chaos.counters import Reading
    from moe_runtime.chaos.reference import Reference
    from moe_runtime.chaos.schedule import Fault

#: Seconds of traffic between two settlements.
SETTLE_EVERY_S = 15.0
_SETTLE_WITHIN_S = 45.0
#: How long the cluster may take to be whole again when the faults are over.
_WHOLE_WITHIN_S = 60.0
#: How long the load lasts after that, when nothing fails and counters and ledger have to be equal.
_CALM_S = 8.0
_TICK_S = 0.1
_SHOW_EVERY_S = 0.5


@dataclass(frozen=True)
class Progress:
    """What is shown while a run goes on.

    Attributes:
        left_s: Seconds of load left.
        num_requests: Requests entered.
        num_faults: Faults brought.
        num_errors: Requests that ended with an error.
        num_wrong: Mistakes found, late answers included.
    """

    left_s: float
    num_requests: int
    num_faults: int
    num_errors: int
    num_wrong: int


class Storm:
    """Sends load to a cluster and brings it the faults of a schedule, and enters everything in a ledger.

    Attributes:
        ledger: Every request and its outcome.
        injector: What was done.
        lag: How late this process itself ran.
        footprint: What routers and controller held.
        comparisons: Windows between settlements, by how they could be compared.
        is_whole_again: Whether every part of the cluster was back in time when the faults were over.
        was_stopped: Whether somebody asked for an early end.
        load_s: How long the load lasted.
    """

    def __init__(self, cluster: Cluster, *, seed: int, reference: Reference) -> None:
        """Make clients and injector; call it within an event loop."""
        self._cluster = cluster
        self.ledger = Ledger()
        self.lag = Lag()
        self._load = Load(cluster.addresses, seed=seed, ledger=self.ledger, reference=reference, lag=self.lag)
        self.injector = Injector(cluster, self._load, seed=seed)
        self._counters = CounterReader(cluster.addresses)
        self._reading: Reading | None = None
        self._stop = asyncio.Event()
        self.footprint = FootprintMeter()
        self.comparisons: Counter[Comparison] = Counter()
        self.is_whole_again = False
        self.was_stopped = False
        self.load_s = 0.0

    def stop(self) -> None:
        """End in order, as soon as the requests that are under way have their answers."""
        self.was_stopped = True
        self._stop.set()

    async def run(
        self, schedule: Sequence[Fault], *, duration_s: float, on_progress: Callable[[Progress], None]
    ) -> None:
        """Return when load and faults are over and every request has ended, or was given up as lost."""
        started_at = time.monotonic()
        background = [
            asyncio.create_task(work)
            for work in (
                self.lag.run(),
                self._cluster.watch(),
                self.footprint.run(self._cluster),
                self._show(started_at + duration_s, on_progress),
            )
        ]
        try:
            await self._settle()
            load = asyncio.create_task(self._load.run())
            faults = asyncio.create_task(self.injector.run(schedule, started_at=started_at))
            await self._settle_until(started_at + duration_s)
            self.injector.stop()
            await faults
            await self._await_whole()
            self._load.calm_down()
            await self._settle()
            await self._wait(_CALM_S)
            self._load.stop()
            await load
            self.load_s = time.monotonic() - started_at
            await self._settle()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._load.close()
            await self._counters.close()

    async def _settle_until(self, moment: float) -> None:
        """Settle every so often until a moment, or until ``stop``."""
        while (left_s := moment - time.monotonic()) > 0 and not self._stop.is_set():
            await self._wait(min(left_s, SETTLE_EVERY_S))
            await self._settle()

    async def _settle(self) -> None:
        """Hold traffic until nothing is under way, compare counters with the ledger, and go on."""
        self._load.hold()
        await _until(lambda: not self.ledger.sums().num_lost, within_s=_SETTLE_WITHIN_S)
        sums = self.ledger.sums()
        after = None if sums.num_lost else await self._counters.read(sums)
        before, self._reading = self._reading, after
        if before is not None:
            self._compare(before, after)
        self._load.release()

    def _compare(self, before: Reading, after: Reading | None) -> None:
        if after is None:
            self.comparisons[Comparison.NONE] += 1
            return
        comparison = comparison_of(before, after, router_fault_at=self.injector.last_router_fault_at)
        self.comparisons[comparison] += 1
        for mistake in mistakes_in_counters(before, after, comparison):
            self.ledger.note_mistake(mistake)

    async def _await_whole(self) -> None:
        """Let traffic go on until everything is back."""
        await _until(lambda: self._cluster.is_whole or self._stop.is_set(), within_s=_WHOLE_WITHIN_S)
        self.is_whole_again = self._cluster.is_whole

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    async def _show(self, ends_at: float, on_progress: Callable[[Progress], None]) -> None:
        while True:
            sums = self.ledger.sums()
            on_progress(
                Progress(
                    left_s=max(0.0, ends_at - time.monotonic()),
                    num_requests=sums.num_requests,
                    num_faults=self.injector.num_faults.total(),
                    num_errors=sums.errors.total(),
                    num_wrong=sums.num_wrong + sums.num_late,
                )
            )
            await asyncio.sleep(_SHOW_EVERY_S)


async def _until(is_so: Callable[[], bool], *, within_s: float) -> None:
    """Return when something has become so, or has not in time."""
    give_up_at = time.monotonic() + within_s
    while not is_so() and time.monotonic() < give_up_at:
        # Nothing tells: neither the ledger nor the controller calls back.
        await _tick()


async def _tick() -> None:
    await asyncio.sleep(_TICK_S)
