"""Bounds the series of a layer with many experts: the hottest by name, the rest as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

#: The label of all experts that are not named. An expert that is called so is never named by itself.
OTHER = "other"
#: An expert takes the place of a named one when it has served so many times as much: places change seldom.
_TAKES_OVER_AT = 2.0


class Series(NamedTuple):
    """What one label stands for."""

    label: str
    values: NDArray[np.float64]


class HottestExperts:
    """Divides counters of a layer's experts among ``most`` named series and the series ``other``.

    No series ever goes back, also when an expert gets or loses its name: what was counted under a label stays there,
    so Prometheus sees no reset where nothing was reset. The series add up to the totals as long as no expert has lost
    its name; a series that ends takes its share with it.

    Args:
        names: Of the layer's experts.
        most: Experts to be named; all are where there are no more.
    """

    def __init__(self, names: Sequence[str], *, most: int) -> None:
        self.names = tuple(names)
        self._is_named = np.zeros(len(self.names), dtype=np.bool_)
        self._may_be_named = np.array([name != OTHER for name in self.names], dtype=np.bool_)
        self._is_named[np.flatnonzero(self._may_be_named)[:most]] = True
        #: Per expert, what is counted under the label that it does not have at present.
        self._parked: NDArray[np.float64] | None = None
        #: The totals of the last time.
        self._shown: NDArray[np.float64] | None = None

    @property
    def named(self) -> list[int]:
        """The experts that have series of their own, by their place."""
        return np.flatnonzero(self._is_named).tolist()

    def split(self, totals: NDArray[np.float64], loads: NDArray[np.float64]) -> Iterator[Series]:
        """The present series.

        Args:
            totals: Counters, ``(num_experts, num_counters)``; none is lower than the time before.
            loads: What makes an expert hot, ``(num_experts,)``.
        """
        if self._parked is None or self._shown is None:
            self._parked, self._shown = np.zeros_like(totals), np.zeros_like(totals)
        parked, shown = self._parked, self._shown
        for leaving, coming in self._changes(loads):
            # What a series has counted since it was last shown would end with it unseen: the others get it.
            parked[leaving] = shown[leaving] - parked[leaving]
            parked[coming] = totals[coming] - parked[coming]
            self._is_named[[leaving, coming]] = False, True
        self._shown = totals.copy()
        for expert in np.flatnonzero(self._is_named).tolist():
            yield Series(self.names[expert], totals[expert] - parked[expert])
        if not self._is_named.all():
            rest = np.where(self._is_named[:, None], parked, totals - parked)
            yield Series(OTHER, rest.sum(axis=0))

    def _changes(self, loads: NDArray[np.float64]) -> list[tuple[int, int]]:
        named = np.flatnonzero(self._is_named)
        others = np.flatnonzero(~self._is_named & self._may_be_named)
        coldest = named[np.argsort(loads[named], kind="stable")]
        hottest = others[np.argsort(-loads[others], kind="stable")]
        pairs = zip(coldest.tolist(), hottest.tolist(), strict=False)
        return [(cold, hot) for cold, hot in pairs if loads[hot] > _TAKES_OVER_AT * loads[cold]]
