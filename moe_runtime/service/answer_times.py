"""How long an expert usually takes to answer."""

from __future__ import annotations

#: Answer times that are kept of an expert, and how many it takes to know what is usual.
_NUM_KEPT = 128
_NUM_NEEDED = 20
#: The quantile is worked out anew after so many answers.
_NUM_BETWEEN = 16


class AnswerTimes:
    """The latest answer times of one expert, in seconds.

    Args:
        quantile: What is asked for, between 0 and 1.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._times: list[float] = []
        self._num_seen = 0
        self._usual: float | None = None

    @property
    def usual_s(self) -> float | None:
        """The quantile of the latest times, as it was a few answers ago at most; None while too few are known."""
        return self._usual

    def add(self, seconds: float) -> None:
        """Add an answer's time, in the place of the oldest."""
        if len(self._times) < _NUM_KEPT:
            self._times.append(seconds)
        else:
            self._times[self._num_seen % _NUM_KEPT] = seconds
        self._num_seen += 1
        if self._num_seen >= _NUM_NEEDED and (self._num_seen - _NUM_NEEDED) % _NUM_BETWEEN == 0:
            ranked = sorted(self._times)
            self._usual = ranked[min(int(self._quantile * len(ranked)), len(ranked) - 1)]
