"""The loop of an expert host: requests in, their rows through the experts, answers out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.errors import TransportError
from moe_runtime.experts.deadline import answer_within
from moe_runtime.experts.host import MAX_MERGED_ROWS
from moe_runtime.service.host_answers import all_failed, calls_of, mismatch, too_late
from moe_runtime.service.ports import HostReply, MonotonicClock, SegmentResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from moe_runtime.experts.host import ExpertHost, ExpertRun
    from moe_runtime.experts.outcomes import ExpertOutcome
    from moe_runtime.service.ports import Clock, Delivery, HostRequest, HostTransport

_LOG = logging.getLogger(__name__)

#: Beyond this many, requests stay with the transport, whose queues push back on the routers.
MAX_WAITING = 4096
#: A batch is joined from many requests; a line of the log names a few of them.
MAX_LOGGED_IDS = 3
#: How long the idle loop sleeps in ``receive``; ``stop`` wakes it at once.
IDLE_WAIT_S = 60.0


class _Waiting(NamedTuple):
    """A request that was received, and when."""

    delivery: Delivery
    received_at: float


class _UnderWay(NamedTuple):
    """Requests whose rows are with the experts."""

    batch: list[_Waiting]
    run: ExpertRun


class HostLoop:
    """Serves one expert host: everything that has arrived runs together, and each request gets its answer.

    Rows of one replica are merged across requests and routers. One run takes whole requests, in the order of
    arrival, up to ``max_rows_per_run`` rows, so that under load the first answers do not wait for the last. A suspect
    is run by itself, and its router told first: if this process dies then, it is known of what.
    A request that has waited here for longer than its ``timeout_s`` is not run: nobody waits for its rows. It is
    answered with an error, which gives back what it took of the router's credit and memory.

    Owned by the thread that calls ``run``; ``stop`` may be called from any, and what tells how it is doing never
    waits for an expert.

    Attributes:
        num_requests: Requests received.
        num_answered: Requests answered, in whatever way.
        num_rows: Rows run.
        num_skipped_late: Requests skipped because they were too late.
        num_failed_segments: Segments answered with an error.
    """

    def __init__(
        self,
        host: ExpertHost,
        transport: HostTransport,
        *,
        clock: Clock | None = None,
        max_rows_per_run: int = MAX_MERGED_ROWS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Make the loop; it neither starts nor closes the host and the transport.

        Args:
            host: Runs the rows.
            transport: Where requests come from and answers go.
            clock: Tells how long requests have waited; the machine's when None.
            max_rows_per_run: Rows above which waiting requests are left for the next run.
            max_waiting: Requests that may wait here; while so many do, more stay with the transport.
        """
        self._host = host
        self._transport = transport
        self._clock = MonotonicClock() if clock is None else clock
        self._max_rows_per_run = max_rows_per_run
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._under_way: _UnderWay | None = None
        self._stopping = threading.Event()
        self._busy_since: float | None = None
        self.num_requests = 0
        self.num_answered = 0
        self.num_rows = 0
        self.num_skipped_late = 0
        self.num_failed_segments = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait here or are with the experts: none where it is idle. Thread-safe."""
        # In this order: a request that is answered meanwhile is rather counted as waiting.
        num_answered = self.num_answered
        return self.num_requests - num_answered

    @property
    def busy_s(self) -> float:
        """For how long the run that is under way has been; 0 where none is. Thread-safe."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else max(0.0, self._clock.now() - busy_since)

    def run(self) -> None:
        """Serve until ``stop``. Requests that wait then are not answered."""
        # Once for the thread: to enter it for every forward takes as long as a small expert does.
        with torch.inference_mode():
            while not self._stopping.is_set():
                self.serve_once(IDLE_WAIT_S)
            self._finish_run_under_way()

    def stop(self) -> None:
        """Make ``run`` return after the run that is under way, or at once if it has not begun. Thread-safe."""
        self._stopping.set()
        self._transport.wake()

    def serve_once(self, timeout_s: float) -> None:
        """Receive what has arrived, and run and answer one run's worth of what waits.

        A device that computes by itself is given the next run before the answers of this one are awaited, if
        there is one: then they leave with the next call.

        Args:
            timeout_s: How long to wait for a request when none is here.
        """
        now = self._receive(0.0 if self._waiting else timeout_s)
        batch = self._take_batch(now)
        if batch:
            self._busy_since = now
            # Merged calls are one forward: it is of use for as long as anybody waits.
            answer_within(max([each.delivery.request.timeout_s + each.received_at for each in batch]) - now)
            self._tell_of_suspect(batch[0].delivery)
        run = self._host.begin([call for delivery, _ in batch for call in calls_of(delivery.request)])
        self._finish_run_under_way()
        if self._host.overlaps:
            self._receive(0.0)
            if self._waiting:
                self._under_way = _UnderWay(batch, run)
                return
        self._finish(batch, run)
        self._busy_since = None

    def _receive(self, timeout_s: float) -> float:
        """Let requests in, unless too many wait; the time at which they came."""
        deliveries = self._transport.receive(timeout_s) if len(self._waiting) < self._max_waiting else []
        now = self._clock.now()
        for delivery in deliveries:
            self.num_requests += 1
            self._waiting.append(_Waiting(delivery, now))
        return now

    def _take_batch(self, now: float) -> list[_Waiting]:
        """Requests for one run, at least one if any waits; those that are too late are skipped."""
        batch: list[_Waiting] = []
        num_rows = 0
        while self._waiting:
            waiting = self._waiting[0]
            delivery, received_at = waiting
            request = delivery.request
            waited_s = now - received_at
            if waited_s > request.timeout_s:
                self._skip_late(delivery)
            elif batch and self._is_for_another_run(request, batch, num_rows=num_rows):
                break
            else:
                batch.append(waiting)
                num_rows += request.rows.shape[0]
                if waited_s > 0:
                    self._note_wait(request, waited_s)
            self._waiting.popleft()
        self.num_rows += num_rows
        if _LOG.isEnabledFor(logging.DEBUG):
            _log_run(batch)
        return batch

    def _is_for_another_run(self, request: HostRequest, batch: list[_Waiting], *, num_rows: int) -> bool:
        """Whether a request is not to be run with those that were taken: suspects are run by themselves."""
        if request.is_suspect or batch[0].delivery.request.is_suspect:
            return True
        return num_rows + request.rows.shape[0] > self._max_rows_per_run

    def _tell_of_suspect(self, delivery: Delivery) -> None:
        request = delivery.request
        if request.is_suspect:
            self._transport.reply(delivery, HostReply(request.ticket, (), rows=None, is_begun=True))

    def _skip_late(self, delivery: Delivery) -> None:
        self.num_skipped_late += 1
        self.num_failed_segments += len(delivery.request.segments)
        self._reply(delivery, too_late(delivery.request))
        self.num_answered += 1

    def _note_wait(self, request: HostRequest, waited_s: float) -> None:
        for segment in request.segments:
            self._host.note_wait(segment.replica_id, waited_s)

    def _finish_run_under_way(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._finish(under_way.batch, under_way.run)

    def _finish(self, batch: list[_Waiting], run: ExpertRun) -> None:
        """Wait for the experts, and answer."""
        outcomes = iter(self._host.finish(run, is_late=lambda: self._is_late(batch)))
        for delivery, _ in batch:
            self._answer(delivery, outcomes)
        self.num_answered += len(batch)

    def _is_late(self, batch: list[_Waiting]) -> bool:
        """Whether nobody waits for the answers any more."""
        now = self._clock.now()
        return all(now - received_at > delivery.request.timeout_s for delivery, received_at in batch)

    def _answer(self, delivery: Delivery, outcomes: Iterator[ExpertOutcome]) -> None:
        """Reply with the outcomes of the request's segments, which come next in ``outcomes``."""
        request = delivery.request
        results: list[SegmentResult] = []
        kept: list[Tensor] = []
        has_failed = False
        for segment, outcome in zip(request.segments, outcomes, strict=False):
            rows, error, compute_ms, failed_rows, is_expert_error = outcome
            if rows is not None:
                mistake = mismatch(rows, kept[0]) if kept else None
                if mistake is None:
                    kept.append(rows)
                else:
                    error, failed_rows = mistake, ()
            if error is not None:
                has_failed = True
            results.append(
                SegmentResult(segment.replica_id, segment.num_rows, error, compute_ms, failed_rows, is_expert_error)
            )
        joined = torch.cat(kept) if len(kept) > 1 else kept[0] if kept else None
        if has_failed:
            self._note_failures(request, results)
        self._reply(delivery, HostReply(request.ticket, tuple(results), joined))

    def _reply(self, delivery: Delivery, reply: HostReply) -> None:
        try:
            self._transport.reply(delivery, reply)
        except TransportError as exc:
            # Rows that cannot travel are this request's misfortune, not that of the next one.
            good = [result for result in reply.results if result.error is None]
            self._note_failures(delivery.request, all_failed(good, str(exc)))
            self._transport.reply(delivery, HostReply(reply.ticket, all_failed(reply.results, str(exc)), rows=None))

    def _note_failures(self, request: HostRequest, results: Iterable[SegmentResult]) -> None:
        """Count the segments that failed, and tell whose rows they were; never what is in them."""
        ids = request.request_ids
        named = ", ".join(ids[:MAX_LOGGED_IDS]) or "of unknown id"
        more = f" and {len(ids) - MAX_LOGGED_IDS} more" if len(ids) > MAX_LOGGED_IDS else ""
        for result in results:
            if result.error is not None:
                self.num_failed_segments += 1
                _LOG.warning("requests %s%s: %s", named, more, result.error, extra={"request_ids": [*ids]})


def _log_run(batch: Iterable[_Waiting]) -> None:
    for waiting in batch:
        request = waiting.delivery.request
        experts = [segment.replica_id for segment in request.segments]
        about = {"request_ids": request.request_ids, "expert": experts}
        _LOG.debug("running %d rows", request.rows.shape[0], extra=about)
