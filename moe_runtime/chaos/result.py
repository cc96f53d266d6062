"""What a run found out, as JSON has it, and whether a promise was broken."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.ledger import Ending

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from moe_runtime.chaos.ledger import Sums


@dataclass(frozen=True)
class Spread:
    """Some times, in milliseconds.

    Attributes:
        count: How many.
        p50: Median.
        p99: 99th percentile.
        max: Longest.
    """

    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """Of some times in seconds; None if there are none."""
        if not seconds:
            return None
        p50, p99 = np.percentile(seconds, [50, 99]).tolist()
        return cls(len(seconds), *(round(1e3 * value, 3) for value in (p50, p99, max(seconds))))


@dataclass(frozen=True)
class ChaosResult:
    """The outcome of one run.

    Attributes:
        seed: Of the schedule, the weights and the requests.
        minutes: Of load that were asked for.
        load_s: Of load that there were.
        was_stopped: Whether somebody ended it early.
        num_requests: Requests made.
        num_ok: Answered.
        num_typed_errors: Ended with an error of a class that says why.
        num_transport_errors: Ended because no router could be reached.
        errors: Both, by class.
        innocent_errors: Those of requests that were not made to make experts fail, by class.
        messages: What the first error of each class said.
        num_wrong: Answers with a mistake, errors that a right request must not end with, and counters of routers
            that differ from the ledger.
        num_lost: Without an outcome.
        num_late: Ended more than 100 ms after their deadline, the lag of this process apart.
        num_late_excused: Would be late, but for that lag.
        num_leaks: Processes, sockets, segments, descriptors and growing memory that the run left.
        mistakes: The first of all these, in words.
        num_kills: Processes killed by a signal.
        num_faults: Faults, by kind.
        served: Assignments that an expert answered.
        dropped_capacity: Assignments dropped because the expert was full.
        dropped_failure: Assignments dropped because the expert was dead, late or wrong.
        retried: Assignments that went to another replica.
        rerouted: Assignments that went to another expert.
        hedged: Assignments that were sent to a second replica as well.
        latency_ms: Of the answers, at the caller.
        worst_overshoot_ms: Longest time after a deadline.
        worst_lag_ms: Longest time for which a thread of this process did not run.
        counters_compared: Windows in which counters and ledger were compared, by how strictly.
        is_whole_again: Whether every part was ready again after the last fault.
        back_ms: From the loss of a part to its successor's readiness, by fault.
        growth: What routers and controllers held, and how it grew.
        recovery_ms: Times that were measured apart, without other faults; None where that was left out.
    """

    seed: int
    minutes: float
    load_s: float
    was_stopped: bool
    num_requests: int
    num_ok: int
    num_typed_errors: int
    num_transport_errors: int
    errors: Mapping[str, int]
    innocent_errors: Mapping[str, int]
    messages: Mapping[str, str]
    num_wrong: int
    num_lost: int
    num_late: int
    num_late_excused: int
    num_leaks: int
    mistakes: tuple[str, ...]
    num_kills: int
    num_faults: Mapping[str, int]
    served: int
    dropped_capacity: int
    dropped_failure: int
    retried: int
    rerouted: int
    hedged: int
    latency_ms: Spread | None
    worst_overshoot_ms: float
    worst_lag_ms: float
    counters_compared: Mapping[str, int]
    is_whole_again: bool
    back_ms: Mapping[str, Spread | None]
    growth: tuple[Mapping[str, Any], ...]
    recovery_ms: Mapping[str, Spread | None] | None = None

    @property
    def broken(self) -> dict[str, int]:
        """The promises that were broken, and how often."""
        counts = {name: getattr(self, name) for name in ("num_wrong", "num_lost", "num_late", "num_leaks")}
        return {name: count for name, count in counts.items() if count}

    def write_json(self, path: Path, *, machine: Mapping[str, Any]) -> None:
        """Write everything to a file.

        Args:
            path: The file.
            machine: Where it was found out.
        """
        date = datetime.now(UTC).isoformat(timespec="seconds")
        path.write_text(json.dumps({"date": date, "machine": dict(machine), **asdict(self)}, indent=1) + "\n")

    def check(self) -> None:
        """Do nothing if every promise was kept.

        Raises:
            ChaosError: Otherwise.
        """
        if self.broken:
            found = ", ".join(f"{name} {count}" for name, count in self.broken.items())
            raise ChaosError(f"chaos with seed {self.seed}: expected none wrong, lost, late or leaked, found {found}")


def sums_of(sums: Sums) -> dict[str, Any]:
    """The fields of a result that the ledger's sums are."""
    return {
        "num_requests": sums.num_requests,
        "num_ok": sums.endings[Ending.OK],
        "num_typed_errors": sums.endings[Ending.TYPED_ERROR],
        "num_transport_errors": sums.endings[Ending.TRANSPORT_ERROR],
        "errors": dict(sorted(sums.errors.items())),
        "innocent_errors": {name: count for name, count in sorted(sums.innocent_errors.items()) if count},
        "num_wrong": sums.num_wrong,
        "num_lost": sums.num_lost,
        "num_late": sums.num_late,
        "num_late_excused": sums.num_excused,
        "served": sums.counts["num_served"],
        "dropped_capacity": sums.counts["num_dropped_capacity"],
        "dropped_failure": sums.counts["num_dropped_failure"],
        "retried": sums.counts["num_retried"],
        "rerouted": sums.counts["num_rerouted"],
        "hedged": sums.counts["num_hedged"],
        "worst_overshoot_ms": round(1e3 * sums.worst_overshoot_s, 3),
    }
