"""Whether the routers' own counters say what the ledger says, over windows of time between two quiet moments."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_runtime.chaos.layer import LAYER
from moe_runtime.chaos.ledger import Ending
from moe_runtime.errors import MoERuntimeError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.retries import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_runtime.chaos.ledger import Sums

_ASK_TIMEOUT_S = 2.0
_QUIET_WITHIN_S = 5.0
_ASK_EVERY_S = 0.05
#: Counted per expert by a router, and in every report.
_SUMMED = (
    "num_served",
    "num_dropped_capacity",
    "num_dropped_failure",
    "num_retried",
    "num_rerouted",
    "num_hedged",
)


class Comparison(StrEnum):
    """How a window can be compared."""

    #: No router was touched and every request was answered: counters and ledger are equal.
    EXACT = "exact"
    #: No router was touched: what requests without an answer asked for may have been computed, or not.
    BOUNDED = "bounded"
    #: A router was frozen: what it had may have been computed twice, elsewhere too. At least the ledger's sums.
    AT_LEAST = "at_least"
    #: A router ended, and with it its counters; or one does not answer.
    NONE = "none"


@dataclass(frozen=True)
class Reading:
    """The counters of all routers, and the ledger's sums, at a moment at which no request was under way.

    Attributes:
        at: When, on this machine's clock.
        counts: Sums over the routers.
        sums: The ledger's.
        youngest_s: For how long the router that was started last had been up.
    """

    at: float
    counts: Mapping[str, int]
    sums: Sums
    youngest_s: float


def comparison_of(before: Reading, after: Reading, *, router_fault_at: float) -> Comparison:
    """How the window between two readings can be compared.

    Args:
        before: The window's beginning.
        after: Its end.
        router_fault_at: When a router was last touched.
    """
    if after.youngest_s < after.at - before.at:
        return Comparison.NONE
    if router_fault_at >= before.at:
        return Comparison.AT_LEAST
    num_failed = _num_failed(after.sums) - _num_failed(before.sums)
    return Comparison.BOUNDED if num_failed else Comparison.EXACT


def mistakes_in_counters(before: Reading, after: Reading, comparison: Comparison) -> tuple[str, ...]:
    """Counters of the routers that differ from the ledger by more than the comparison allows."""
    if comparison is Comparison.NONE:
        return ()
    entered = {name: after.sums.counts[name] - before.sums.counts[name] for name in _SUMMED}
    slack = dict.fromkeys(_SUMMED, after.sums.failed_assignments - before.sums.failed_assignments)
    entered["num_answered"] = after.sums.endings[Ending.OK] - before.sums.endings[Ending.OK]
    slack["num_answered"] = _num_failed(after.sums) - _num_failed(before.sums)
    mistakes = []
    for name, expected in entered.items():
        found = after.counts[name] - before.counts[name]
        most = expected + slack[name] if comparison is Comparison.BOUNDED else expected
        if found < expected or (comparison is not Comparison.AT_LEAST and found > most):
            span = f"{expected} to {most}" if most > expected else f"{expected}"
            mistakes.append(f"counters, {comparison}: expected {name} of the routers to grow by {span}, found {found}")
    return tuple(mistakes)


class CounterReader:
    """Asks every router for its counters, each at its own address."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Connect with the first reading."""
        once = RetryPolicy(max_attempts=1)
        self._clients = [AsyncMoEClient(address, retry_policy=once) for address in addresses]

    async def read(self, sums: Sums) -> Reading | None:
        """The counters, once no router has a request open; None if that does not come, or one does not answer.

        Args:
            sums: The ledger's, none of whose requests is under way.
        """
        give_up_at = time.monotonic() + _QUIET_WITHIN_S
        while time.monotonic() < give_up_at:
            try:
                statuses = await asyncio.gather(*(client.status(timeout_s=_ASK_TIMEOUT_S) for client in self._clients))
            except MoERuntimeError:
                return None
            if not any(status["open_requests"] for status in statuses) and not _batches_in_flight(statuses):
                uptimes_s = [status["uptime_s"] for status in statuses]
                return Reading(time.monotonic(), _count(statuses), sums, min(uptimes_s))
            await asyncio.sleep(_ASK_EVERY_S)
        return None

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients))


def _num_failed(sums: Sums) -> int:
    return sums.num_ended - sums.endings[Ending.OK]


def _batches_in_flight(statuses: Sequence[Mapping[str, Any]]) -> int:
    return sum(status["layers"][LAYER]["batches_in_flight"] for status in statuses)


def _count(statuses: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    experts = [expert for status in statuses for expert in status["layers"][LAYER]["experts"]]
    counts = {name: sum(expert[name] for expert in experts) for name in _SUMMED}
    return {**counts, "num_answered": sum(status["num_answered"] for status in statuses)}
