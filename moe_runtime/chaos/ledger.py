"""The ledger of a run: each request has exactly one outcome, and the sums of them all."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.wire.messages import Report

#: How long after its deadline an answer may reach the caller.
GRACE_S = 0.1
#: Mistakes that are kept in words; beyond them they are counted.
_MAX_EXAMPLES = 50
_COUNTED = (
    "num_tokens",
    "num_served",
    "num_dropped_capacity",
    "num_dropped_failure",
    "num_retried",
    "num_rerouted",
    "num_hedged",
)


class Ending(StrEnum):
    """How a request can end."""

    OK = "ok"
    TYPED_ERROR = "typed_error"
    TRANSPORT_ERROR = "transport_error"


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    Attributes:
        ending: In which way.
        elapsed_s: From the call to its return, at the caller.
        timeout_s: The deadline that the call was given.
        lag_s: For how long in all the caller's own threads did not run after the deadline: not the runtime's doing.
        error: Class of the error; empty where there was none.
        message: What the error said.
        is_poisoned: Whether the request was made to make experts fail.
        report: The answer's; None where there was an error.
        mistakes: What is wrong with it, in words.
    """

    ending: Ending
    elapsed_s: float
    timeout_s: float
    lag_s: float = 0.0
    error: str = ""
    message: str = ""
    is_poisoned: bool = False
    report: Report | None = None
    mistakes: tuple[str, ...] = ()

    @property
    def overshoot_s(self) -> float:
        """How long after its deadline it came; 0 if before."""
        return max(0.0, self.elapsed_s - self.timeout_s)

    @property
    def is_late(self) -> bool:
        """Whether it came later than it may, what the caller lost by its own lag apart."""
        return self.overshoot_s > GRACE_S + self.lag_s


@dataclass(frozen=True)
class Sums:
    """Totals of a ledger at one moment.

    Attributes:
        num_requests: Entered.
        endings: Requests by how they ended.
        errors: Requests by the class of their error.
        innocent_errors: Those of requests that were not made to make experts fail.
        counts: Of the answers' reports, by the names of their fields.
        failed_assignments: Assignments that requests without an answer asked for.
        num_wrong: Requests with a mistake, and requests that ended twice.
        num_late: Requests that ended too late.
        num_excused: Requests past their deadline by more than allowed, but for the caller's own lag.
        worst_overshoot_s: Longest time past a deadline.
    """

    num_requests: int = 0
    endings: Counter[Ending] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    innocent_errors: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    failed_assignments: int = 0
    num_wrong: int = 0
    num_late: int = 0
    num_excused: int = 0
    worst_overshoot_s: float = 0.0

    @property
    def num_ended(self) -> int:
        """Requests that have an outcome."""
        return self.endings.total()

    @property
    def num_lost(self) -> int:
        """Requests that have none."""
        return self.num_requests - self.num_ended


class Ledger:
    """Enters requests and their outcomes. Thread-safe."""

    def __init__(self) -> None:
        """Begin with an empty page."""
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._num_requests = 0
        self._endings: Counter[Ending] = Counter()
        self._errors: Counter[str] = Counter()
        self._innocent_errors: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._failed_assignments = 0
        self._num_wrong = self._num_late = self._num_excused = 0
        self._worst_overshoot_s = 0.0
        self._request_ids: set[str] = set()
        self._latencies_s: list[float] = []
        self._examples: list[str] = []
        self._messages: dict[str, str] = {}

    def enter(self, num_assignments: int) -> int:
        """A request is about to be made; its number."""
        with self._lock:
            self._num_requests += 1
            self._open[self._num_requests] = num_assignments
            return self._num_requests

    def close(self, number: int, outcome: Outcome) -> None:
        """A request has ended; a second ending of one request, or of one id, is a mistake of its own."""
        with self._lock:
            num_assignments = self._open.pop(number, None)
            mistakes = [*outcome.mistakes]
            if num_assignments is None:
                mistakes.append("it had ended before")
            else:
                self._count(outcome, num_assignments)
            if outcome.report is not None:
                if outcome.report.request_id in self._request_ids:
                    mistakes.append(f"its id {outcome.report.request_id} was answered before")
                self._request_ids.add(outcome.report.request_id)
            self._judge(number, outcome, mistakes)

    def note_mistake(self, text: str) -> None:
        """Something is wrong that is not one request's."""
        with self._lock:
            self._num_wrong += 1
            self._keep(text)

    def sums(self) -> Sums:
        """The totals so far."""
        with self._lock:
            return Sums(
                num_requests=self._num_requests,
                endings=self._endings.copy(),
                errors=self._errors.copy(),
                innocent_errors=self._innocent_errors.copy(),
                counts=self._counts.copy(),
                failed_assignments=self._failed_assignments,
                num_wrong=self._num_wrong,
                num_late=self._num_late,
                num_excused=self._num_excused,
                worst_overshoot_s=self._worst_overshoot_s,
            )

    def latencies_s(self) -> list[float]:
        """Of every answer, in the order in which they came."""
        with self._lock:
            return self._latencies_s.copy()

    def examples(self) -> tuple[str, ...]:
        """The first mistakes, in words."""
        with self._lock:
            return tuple(self._examples)

    def messages(self) -> dict[str, str]:
        """What the first error of each class said."""
        with self._lock:
            return self._messages.copy()

    def _count(self, outcome: Outcome, num_assignments: int) -> None:
        self._endings[outcome.ending] += 1
        if outcome.report is None:
            self._errors[outcome.error] += 1
            self._innocent_errors[outcome.error] += not outcome.is_poisoned
            self._messages.setdefault(outcome.error, outcome.message)
            self._failed_assignments += num_assignments
            return
        self._latencies_s.append(outcome.elapsed_s)
        for name in _COUNTED:
            self._counts[name] += getattr(outcome.report, name)

    def _judge(self, number: int, outcome: Outcome, mistakes: list[str]) -> None:
        self._worst_overshoot_s = max(self._worst_overshoot_s, outcome.overshoot_s)
        if outcome.is_late:
            self._num_late += 1
            late_ms, lag_ms = 1e3 * outcome.overshoot_s, 1e3 * outcome.lag_s
            self._keep(f"request {number}: {late_ms:.0f} ms after its deadline, with a lag of {lag_ms:.0f} ms here")
        elif outcome.overshoot_s > GRACE_S:
            self._num_excused += 1
        if mistakes:
            self._num_wrong += 1
            self._keep(f"request {number}: {'; '.join(mistakes)}")

    def _keep(self, text: str) -> None:
        if len(self._examples) < _MAX_EXAMPLES:
            self._examples.append(text)
