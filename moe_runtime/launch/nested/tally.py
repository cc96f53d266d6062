"""What became of the assignments within a layer that is an expert: counted, and told when something was lost."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.wire.messages import Report

_LOG = logging.getLogger(__name__)

#: One line of the log per kind of trouble in so many seconds.
SAY_AGAIN_AFTER_S = 10.0
_COUNTED = ("num_assignments", "num_served", "num_dropped_capacity", "num_dropped_failure", "num_rerouted")


def total_loss(report: Report) -> str | None:
    """What became of a call of which experts failed and none, shared or not, served anything; None of all others."""
    num_failed = report.num_dropped_failure + report.num_shared_dropped
    if not num_failed or report.num_served or report.num_shared_served:
        return None
    return f"served none of {report.num_assignments + report.num_shared_dropped} assignments: {_reasons(report)}"


class InnerTally:
    """Counters of one expert, and their log. Used by its host's thread; ``counts`` may be called from any.

    Args:
        where: How messages name the layer.
        now: Seconds.
    """

    def __init__(self, where: str, *, now: Callable[[], float]) -> None:
        self._where = where
        self._now = now
        self._counts: Counter[str] = Counter()
        self._said_at: dict[str, float] = {}
        self._num_unsaid: Counter[str] = Counter()

    def counts(self) -> dict[str, int]:
        """Calls and how they ended, and the assignments of those that were answered, by what became of them."""
        return dict(self._counts)

    def answered(self, report: Report) -> None:
        """A call was answered; where nothing was served, that fails it, and its host logs the error."""
        self._counts["num_calls"] += 1
        for name in _COUNTED:
            self._counts[name] += getattr(report, name)
        if total_loss(report) is not None:
            self._counts["num_failed_calls"] += 1
        elif report.num_dropped_failure:
            text = f"{report.num_dropped_failure} of {report.num_assignments} assignments lost: {_reasons(report)}"
            self._tell("dropped_failure", text)

    def failed(self, error: BaseException) -> None:
        """A call got no answer; its host logs the error."""
        self._counts["num_calls"] += 1
        self._counts["num_failed_calls"] += 1
        self._counts[f"num_{type(error).__name__}"] += 1

    def _tell(self, kind: str, text: str) -> None:
        now = self._now()
        if now - self._said_at.get(kind, float("-inf")) < SAY_AGAIN_AFTER_S:
            self._num_unsaid[kind] += 1
            return
        more = f" (and {self._num_unsaid[kind]} times more since the last time)" if self._num_unsaid[kind] else ""
        self._said_at[kind], self._num_unsaid[kind] = now, 0
        _LOG.warning("%s: %s%s", self._where, text, more)


def _reasons(report: Report) -> str:
    return "; ".join(report.warnings[:3]) or "no reason given"
