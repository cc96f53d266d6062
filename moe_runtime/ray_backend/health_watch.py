"""What a host's pings say about it: a sequence of answers, and of none, becomes one finding at a time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.ray_backend.pace import Pace
    from moe_runtime.ray_backend.plan import HostHealth

_MIB = 1 << 20
#: Routers need a moment to follow a table, and then send no more.
_NUM_IDLE_PINGS = 2


class Finding(StrEnum):
    """What is to be done about an actor, by why."""

    FIT = "fit"
    #: Suspect, and ready again when that is over.
    SILENT = "silent"
    SLOW = "slow"
    FAULTY = "faulty"
    #: It works, and is to be replaced by another as soon as that costs nothing.
    OUTGROWN = "outgrown"
    #: It is to be killed and replaced.
    LOST = "lost"


@dataclass(frozen=True)
class Verdict:
    """A finding, and its reason in words; None where it is fit."""

    finding: Finding
    reason: str | None = None


@dataclass(frozen=True)
class HealthRules:
    """What is too much for one host.

    Attributes:
        pace: Gives the times.
        max_forward_s: The longest that a forward of its layers may take; None for any time.
        max_rss_bytes: Resident memory of its process; None for any.
    """

    pace: Pace
    max_forward_s: float | None = None
    max_rss_bytes: int | None = None


class Silence:
    """For how long an actor has given no answer."""

    def __init__(self, pace: Pace) -> None:
        """No ping was lost yet."""
        self._max_suspect_s = pace.max_suspect_s
        self._since: float | None = None

    def end(self) -> None:
        """It has answered."""
        self._since = None

    def judge(self, now: float, reason: str) -> Verdict:
        """What a ping means that was not answered, or not as it should.

        Counted from the first lost ping, not from the last answer: a controller that was frozen itself must lose
        pings before it may blame others.
        """
        since = self._since = now if self._since is None else self._since
        if now - since > self._max_suspect_s:
            return Verdict(Finding.LOST, f"{reason}, for more than {self._max_suspect_s:g} s")
        return Verdict(Finding.SILENT, reason)


class HealthWatch:
    """Judges one process of a host by its pings, in their order. A pure function of them and of the time."""

    def __init__(self, pace: Pace) -> None:
        """Know nothing yet of the process."""
        self._pace = pace
        self._silence = Silence(pace)
        #: None until the first answer: what a host did before it was watched, it is not blamed for.
        self._num_faults: Mapping[str, int] | None = None
        self._num_faulty_pings = 0
        self._num_pings_to_clear = 0
        self._faults = ""

    def no_answer(self, now: float, reason: str) -> Verdict:
        """What a ping means that was not answered."""
        return self._silence.judge(now, reason)

    def answer(self, health: HostHealth | None, rules: HealthRules) -> Verdict:
        """What an answer means; one without a health is all that a host can give that has not started."""
        self._silence.end()
        if health is None:
            return Verdict(Finding.FIT)
        faulty = self._judge_faults(health.num_faults)
        if health.unfit is not None:
            return Verdict(Finding.LOST, f"it is unfit: {health.unfit}")
        return (
            _judge_forward(health, rules)
            or (faulty if faulty is not None and faulty.finding is Finding.LOST else None)
            or _judge_memory(health, rules)
            or faulty
            or Verdict(Finding.FIT)
        )

    def _judge_faults(self, num_faults: Mapping[str, int]) -> Verdict | None:
        before, self._num_faults = self._num_faults, num_faults
        known = num_faults if before is None else before
        new = {replica: number - known.get(replica, 0) for replica, number in num_faults.items()}
        new = {replica: number for replica, number in new.items() if number > 0}
        if new:
            self._num_faulty_pings += 1
            self._num_pings_to_clear = self._pace.num_clean_pings
            self._faults = ", ".join(f"{number} of {replica}" for replica, number in sorted(new.items()))
        else:
            self._num_faulty_pings = 0
            self._num_pings_to_clear = max(0, self._num_pings_to_clear - 1)
        if self._num_faulty_pings >= self._pace.num_faulty_pings:
            reason = f"outputs of the wrong kind in {self._num_faulty_pings} pings in a row: lately {self._faults}"
            return Verdict(Finding.LOST, reason)
        if self._num_pings_to_clear:
            return Verdict(Finding.FAULTY, f"outputs of the wrong kind: {self._faults}")
        return None


class Drain:
    """When a host that has left the table has finished what it has."""

    def __init__(self, deadline: float) -> None:
        """Wait until a time of the clock at most."""
        self._deadline = deadline
        self._num_idle_pings = 0

    def is_over(self, health: HostHealth | None, now: float) -> bool:
        """Whether it has, by its newest answer."""
        is_idle = health is None or not health.num_waiting
        self._num_idle_pings = self._num_idle_pings + 1 if is_idle else 0
        return now >= self._deadline or self._num_idle_pings >= _NUM_IDLE_PINGS


def _judge_forward(health: HostHealth, rules: HealthRules) -> Verdict | None:
    limit_s, pace = rules.max_forward_s, rules.pace
    if limit_s is None or health.busy_s <= limit_s:
        return None
    if health.busy_s > max(pace.min_hang_s, pace.hang_factor * limit_s):
        return Verdict(Finding.LOST, f"its forward hangs: it has run for {health.busy_s:.1f} s, {limit_s:g} s are due")
    return Verdict(Finding.SLOW, f"a forward has run for {health.busy_s:.1f} s, {limit_s:g} s are due")


def _judge_memory(health: HostHealth, rules: HealthRules) -> Verdict | None:
    limit_bytes = rules.max_rss_bytes
    if limit_bytes is None or health.rss_bytes <= limit_bytes:
        return None
    rss, limit = health.rss_bytes / _MIB, limit_bytes / _MIB
    return Verdict(Finding.OUTGROWN, f"its process holds {rss:.0f} MiB, more than max_rss_bytes: {limit:.0f} MiB")
