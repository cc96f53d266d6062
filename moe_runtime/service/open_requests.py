"""The requests that a router has taken in and not answered: each gets exactly one answer, and leaves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from moe_runtime.errors import DeadlineExceededError, RequestCancelledError
from moe_runtime.service.requests import LayerAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.service.pending import PendingRequest
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.stats import RouterStats

_LOG = logging.getLogger(__name__)


class OpenRequests:
    """Open requests by their key. Owned by the service's thread.

    Args:
        stats: Counts how they end.
        clock: Tells the time.
        on_answered: Called after each answer.
    """

    def __init__(self, stats: RouterStats, *, clock: Clock, on_answered: Callable[[], None]) -> None:
        self._stats = stats
        self._clock = clock
        self._on_answered = on_answered
        self._pending: dict[int, PendingRequest] = {}

    def add(self, pending: PendingRequest) -> None:
        """Take a request in."""
        self._stats.num_requests += 1
        self._pending[pending.request_key] = pending

    def get(self, request_key: int) -> PendingRequest | None:
        """The request of a key; None if it was answered."""
        return self._pending.get(request_key)

    def answer(self, request_key: int, answer: LayerAnswer | MoERuntimeError) -> None:
        """Give an open request its answer."""
        pending = self._pending.pop(request_key)
        if isinstance(answer, LayerAnswer):
            self._stats.num_answered += 1
        if _LOG.isEnabledFor(logging.DEBUG):
            self._log(pending, answer)
        try:
            pending.on_done(answer)
        except Exception:
            _LOG.exception("request %s: its caller could not take the answer", pending.request.request_id)
        self._on_answered()

    def _log(self, pending: PendingRequest, answer: LayerAnswer | MoERuntimeError) -> None:
        outcome = "answered" if isinstance(answer, LayerAnswer) else type(answer).__name__
        took_ms = round((self._clock.now() - pending.arrived_at) * 1000.0, 3)
        request = pending.request
        about = {"request_id": request.request_id, "layer": request.layer, "outcome": outcome, "took_ms": took_ms}
        _LOG.debug("request ended", extra=about)

    def fail(self, request_key: int, error: MoERuntimeError) -> None:
        """Answer a request with an error, unless it was answered; its rows that wait leave the queue."""
        pending = self._pending.get(request_key)
        if pending is not None:
            self._stats.num_failed += 1
            pending.generation.batcher.remove(request_key, pending.request.layer)
            self.answer(request_key, error)

    def fail_all(self, error: MoERuntimeError) -> None:
        """Answer every open request with an error."""
        for key in list(self._pending):
            self.fail(key, error)

    def withdraw(self, request_key: int) -> None:
        """Answer a request that its caller gave up."""
        if request_key in self._pending:
            self._stats.num_cancelled += 1
            self.fail(request_key, RequestCancelledError("the request was cancelled by its caller"))

    def expire(self) -> None:
        """Answer the requests whose deadline has passed."""
        now = self._clock.now()
        for key in [key for key, pending in self._pending.items() if pending.deadline <= now]:
            self._stats.num_deadline_exceeded += 1
            waited_ms = (now - self._pending[key].arrived_at) * 1000.0
            self.fail(key, DeadlineExceededError(f"the deadline passed after {waited_ms:.0f} ms in the router"))

    def seconds_to_next_deadline(self) -> float | None:
        """How long until a deadline passes; None where no request is open."""
        nearest = min((pending.deadline for pending in self._pending.values()), default=None)
        return None if nearest is None else nearest - self._clock.now()
