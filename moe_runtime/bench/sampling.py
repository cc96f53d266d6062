"""Times contenders in turns, so that noise on the machine falls on all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    """How much is measured per case: until there is enough, or the time is up, but never less than a minimum.

    Attributes:
        seconds: No round begins later than this, but for the minimum.
        min_rounds: So many are made however long they take.
        max_calls: Of one contender; no round begins once every contender has made so many.
    """

    seconds: float
    min_rounds: int
    max_calls: int = 400


def time_calls(call: Callable[[], object], num_calls: int) -> list[float]:
    """Seconds of each of some calls."""
    times = []
    for _ in range(num_calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def rounds(
    effort: Effort, *, num_calls: Callable[[], int] = lambda: 0, now: Callable[[], float] = time.perf_counter
) -> Iterator[int]:
    """The numbers of the rounds that an effort allows, from 0.

    Args:
        effort: How much is measured.
        num_calls: How many calls the contender with the fewest has made.
        now: Seconds.
    """
    started, number = now(), 0
    while number < effort.min_rounds or (now() - started < effort.seconds and num_calls() < effort.max_calls):
        yield number
        number += 1


def interleave(
    contenders: Sequence[Contender], *, effort: Effort, now: Callable[[], float] = time.perf_counter
) -> dict[str, Sample]:
    """Times the contenders in rounds; each round gives every one of them a turn of a few calls.

    The order is reversed from round to round, so that nobody always follows the same neighbour. A first turn of
    each, which warms up and tells how many calls make a turn, does not count.

    Args:
        contenders: Who is timed.
        effort: How much is measured.
        now: Seconds.

    Returns:
        A sample for each contender, by name.
    """
    calls = {contender.name: _calls_per_turn(contender) for contender in contenders}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in rounds(effort, num_calls=lambda: min(map(len, times.values())), now=now):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            times[contender.name] += contender.time_calls(calls[contender.name])
    return {name: Sample.of(seconds) for name, seconds in times.items()}


def _calls_per_turn(contender: Contender) -> int:
    contender.time_calls(1)
    seconds = min(contender.time_calls(2))
    return max(1, min(_MAX_CALLS_PER_TURN, round(_TURN_S / max(seconds, 1e-9))))
