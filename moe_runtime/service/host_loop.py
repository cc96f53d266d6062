"""The loop of an expert host: requests in, their rows through the experts, answers out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from moe_runtime.errors import TransportError
from moe_runtime.experts.host import MAX_MERGED_ROWS, ExpertCall
from moe_runtime.service.ports import HostReply, MonotonicClock, SegmentResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from moe_runtime.experts.host import ExpertHost, ExpertOutcome
    from moe_runtime.service.ports import Clock, Delivery, HostRequest, HostTransport

_LOG = logging.getLogger(__name__)

#: Beyond this many, requests stay with the transport, whose queues push back on the routers.
MAX_WAITING = 4096
#: How long the idle loop sleeps in ``receive``; ``stop`` wakes it at once.
IDLE_WAIT_S = 60.0


@dataclass(frozen=True)
class _Waiting:
    """A request that was received, and when."""

    delivery: Delivery
    received_at: float


class HostLoop:
    """Serves one expert host: everything that has arrived runs together, and each request gets its answer.

    Rows of one replica are merged across requests and routers. One run takes whole requests, in the order of
    arrival, up to ``max_rows_per_run`` rows, so that under load the first answers do not wait for the last.
    A request that has waited here for longer than its ``timeout_s`` is not run: nobody waits for its rows. It is
    answered with an error, which gives back what it took of the router's credit and memory.

    Owned by the thread that calls ``run``; ``stop`` may be called from any.

    Attributes:
        num_requests: Requests received.
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
        self._stopping = threading.Event()
        self.num_requests = 0
        self.num_rows = 0
        self.num_skipped_late = 0
        self.num_failed_segments = 0

    def run(self) -> None:
        """Serve until ``stop``. Requests that wait then are not answered."""
        while not self._stopping.is_set():
            self.serve_once(IDLE_WAIT_S)

    def stop(self) -> None:
        """Make ``run`` return after the run that is under way, or at once if it has not begun. Thread-safe."""
        self._stopping.set()
        self._transport.wake()

    def serve_once(self, timeout_s: float) -> None:
        """Receive what has arrived, and run and answer one run's worth of what waits.

        Args:
            timeout_s: How long to wait for a request when none is here.
        """
        if len(self._waiting) < self._max_waiting:
            deliveries = self._transport.receive(0.0 if self._waiting else timeout_s)
            self.num_requests += len(deliveries)
            now = self._clock.now()
            self._waiting.extend(_Waiting(delivery, now) for delivery in deliveries)
        batch = self._take_batch()
        outcomes = iter(self._host.run([call for delivery in batch for call in _calls(delivery.request)]))
        for delivery in batch:
            self._answer(delivery, outcomes)

    def _take_batch(self) -> list[Delivery]:
        """Requests for one run, at least one if any waits; those that are too late are skipped."""
        now = self._clock.now()
        batch: list[Delivery] = []
        num_rows = 0
        while self._waiting:
            waiting = self._waiting[0]
            request = waiting.delivery.request
            if now - waiting.received_at > request.timeout_s:
                self.num_skipped_late += 1
                self._reply(waiting.delivery, _too_late(request))
            elif batch and num_rows + request.rows.shape[0] > self._max_rows_per_run:
                break
            else:
                batch.append(waiting.delivery)
                num_rows += request.rows.shape[0]
            self._waiting.popleft()
        self.num_rows += num_rows
        return batch

    def _answer(self, delivery: Delivery, outcomes: Iterator[ExpertOutcome]) -> None:
        """Reply with the outcomes of the request's segments, which come next in ``outcomes``."""
        results: list[SegmentResult] = []
        good_rows: list[Tensor] = []
        for segment, outcome in zip(delivery.request.segments, outcomes, strict=False):
            error = outcome.error
            if outcome.rows is not None:
                error = _mismatch(outcome.rows, good_rows)
                if error is None:
                    good_rows.append(outcome.rows)
            results.append(SegmentResult(segment.replica_id, segment.num_rows, error, outcome.compute_ms))
        rows = torch.cat(good_rows) if len(good_rows) > 1 else good_rows[0] if good_rows else None
        self._reply(delivery, HostReply(delivery.request.ticket, tuple(results), rows))

    def _reply(self, delivery: Delivery, reply: HostReply) -> None:
        try:
            self._transport.reply(delivery, reply)
        except TransportError as exc:
            # Rows that cannot travel are this request's misfortune, not that of the next one.
            _LOG.warning("%s", exc)
            results = tuple(msgspec.structs.replace(result, error=result.error or str(exc)) for result in reply.results)
            reply = HostReply(reply.ticket, results, rows=None)
            self._transport.reply(delivery, reply)
        self.num_failed_segments += sum(result.error is not None for result in reply.results)


def _too_late(request: HostRequest) -> HostReply:
    error = f"it waited at its host for longer than {request.timeout_s} s"
    results = tuple(SegmentResult(segment.replica_id, segment.num_rows, error) for segment in request.segments)
    return HostReply(request.ticket, results, rows=None)


def _calls(request: HostRequest) -> Iterable[ExpertCall]:
    parts = torch.split(request.rows, [segment.num_rows for segment in request.segments])
    return (ExpertCall(segment.replica_id, rows) for segment, rows in zip(request.segments, parts, strict=True))


def _mismatch(rows: Tensor, good_rows: list[Tensor]) -> str | None:
    """Why rows cannot travel in one message with those before them, or None if they can."""
    if not good_rows or (rows.shape[1:] == good_rows[0].shape[1:] and rows.dtype == good_rows[0].dtype):
        return None
    return (
        f"expected rows like the message's first, {list(good_rows[0].shape[1:])} {good_rows[0].dtype}, "
        f"found {list(rows.shape[1:])} {rows.dtype}"
    )
