"""Times contenders in turns, so that noise on the machine falls on all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MS = 1000.0
#: A turn makes so many calls that it lasts about this long: enough for caches to be the contender's own.
_TURN_S = 0.03
_MAX_CALLS_PER_TURN = 20


@dataclass(frozen=True)
class Contender:
    """One of those that are timed side by side.

    Attributes:
        name: Unique among them.
        time_calls: Makes so many calls, one after the other, and gives the seconds of each.
    """

    name: str
    time_calls: Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class Sample:
    """Times of one contender's calls in milliseconds, ascending."""

    times_ms: tuple[float, ...]

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Sample:
        """The sample of some times in seconds."""
        return cls(tuple(sorted(seconds * _MS for seconds in times_s)))

    @property
    def median_ms(self) -> float:
        """Half of the calls took less."""
        return statistics.median(self.times_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The middle half of the calls lies between these."""
        return self.quantile(0.25), self.quantile(0.75)

    def quantile(self, share: float) -> float:
        """That share of the calls took at most this."""
        return self.times_ms[max(0, math.ceil(share * len(self.times_ms)) - 1)]


@dataclass(frozen=True)
class Effort:
    """How much is measured per case.

    Attributes:
        seconds: Rounds go on for about this long.
        min_rounds: But there are at least so many.
    """

    seconds: float
    min_rounds: int = 5


def time_calls(call: Callable[[], object], num_calls: int) -> list[float]:
    """Seconds of each of some calls."""
    times = []
    for _ in range(num_calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def interleave(
    contenders: Sequence[Contender], *, effort: Effort, now: Callable[[], float] = time.perf_counter
) -> dict[str, Sample]:
    """Times the contenders in rounds; each round gives every one of them a turn of a few calls.

    The order is reversed from round to round, so that nobody always follows the same neighbour. A first turn of
    each, which warms up and tells how many calls make a turn, does not count.

    Args:
        contenders: Who is timed.
        effort: For how long.
        now: Seconds.

    Returns:
        A sample for each contender, by name.
    """
    calls = {contender.name: _calls_per_turn(contender) for contender in contenders}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    started, num_rounds = now(), 0
    while num_rounds < effort.min_rounds or now() - started < effort.seconds:
        for contender in contenders if num_rounds % 2 == 0 else reversed(contenders):
            times[contender.name] += contender.time_calls(calls[contender.name])
        num_rounds += 1
    return {name: Sample.of(seconds) for name, seconds in times.items()}


def _calls_per_turn(contender: Contender) -> int:
    contender.time_calls(1)
    seconds = min(contender.time_calls(2))
    return max(1, min(_MAX_CALLS_PER_TURN, round(_TURN_S / max(seconds, 1e-9))))
