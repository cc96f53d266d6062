"""The requests that a router has taken in and not answered: each gets exactly one answer, and leaves."""

from __future__ import annotations

import heapq
import logging
from typing import TYPE_CHECKING

from moe_runtime.errors import DeadlineExceededError, RequestCancelledError
from moe_runtime.service.requests import LayerAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.service.pending import PendingRequest
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.queue_stats import QueueStats
    from moe_runtime.service.stats import RouterStats

_LOG = logging.getLogger(__name__)

_FEW_DEADLINES = 64


class OpenRequests:
    """Open requests by their key. Owned by the service's thread.

    Args:
        stats: Counts how they end.
        queue_stats: Counts those that end before any of their rows is computed.
        clock: Tells the time.
        on_answered: Called after each answer, with the client and the level that it was taken in for.
    """

    def __init__(
        self, stats: RouterStats, *, queue_stats: QueueStats, clock: Clock, on_answered: Callable[[str, int], None]
    ) -> None:
        self._stats = stats
        self._queue_stats = queue_stats
        self._clock = clock
        self._on_answered = on_answered
        self._pending: dict[int, PendingRequest] = {}
        # Answered ones stay until they come up, or are half of it.
        self._deadlines: list[tuple[float, int]] = []

    def add(self, pending: PendingRequest) -> None:
        """Take a request in."""
        self._stats.num_requests += 1
        self._pending[pending.request_key] = pending
        if len(self._deadlines) > _FEW_DEADLINES + 2 * len(self._pending):
            self._deadlines = [(each.deadline, key) for key, each in self._pending.items()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (pending.deadline, pending.request_key))

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
        self._on_answered(pending.request.client, pending.level)

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
            self._end(pending, error)

    def fail_all(self, error: MoERuntimeError) -> None:
        """Answer every open request with an error."""
        for key in list(self._pending):
            self.fail(key, error)

    def withdraw(self, request_key: int) -> None:
        """Answer a request that its caller gave up."""
        pending = self._pending.get(request_key)
        if pending is not None:
            self._stats.num_cancelled += 1
            if self._end(pending, RequestCancelledError("the request was cancelled by its caller")):
                self._queue_stats.num_cancelled_before_compute += 1

    def expire(self) -> None:
        """Answer the requests whose deadline has passed."""
        now = self._clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heapq.heappop(self._deadlines)
            pending = self._pending.get(key)
            if pending is None:
                continue
            self._stats.num_deadline_exceeded += 1
            waited_ms = (now - pending.arrived_at) * 1000.0
            error = DeadlineExceededError(f"the deadline passed after {waited_ms:.0f} ms in the router")
            if self._end(pending, error):
                self._queue_stats.num_expired_before_compute += 1

    def seconds_to_next_deadline(self) -> float | None:
        """How long until a deadline passes; None where no request is open."""
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] - self._clock.now() if self._deadlines else None

    def _end(self, pending: PendingRequest, error: MoERuntimeError) -> bool:
        """Answer with an error; whether none of the request's rows had left the queue."""
        self._stats.num_failed += 1
        num_freed = pending.generation.batcher.remove(pending.request_key, pending.request.layer)
        self._queue_stats.num_rows_freed += num_freed
        self.answer(pending.request_key, error)
        return num_freed == pending.request.tokens.shape[0]
