"""Stands between the gRPC handlers and the engine: one thread that batches, drives the engine and answers."""

from __future__ import annotations

import itertools
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.service.batcher import Batcher, QueuedRequest
from moe_runtime.service.budget import QueueBudget
from moe_runtime.service.describe import describe_layer
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.inbox import Inbox
from moe_runtime.service.pending import PendingRequest, Ticket
from moe_runtime.service.ports import MonotonicClock
from moe_runtime.service.report import BatchLedger, empty_report
from moe_runtime.service.requests import LayerAnswer
from moe_runtime.service.validation import unused_options, validate_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.batcher import JoinedBatch
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.pending import OnDone
    from moe_runtime.service.ports import Clock, Transport
    from moe_runtime.service.requests import LayerRequest
    from moe_runtime.service.routing_table import RoutingTable

_LOG = logging.getLogger(__name__)

# Only a bound: every event that matters wakes the transport or has its own time.
_LONGEST_POLL_S = 1.0


class RouterService:
    """Answers every request that it accepts exactly once: with a result whose report is complete, or an error.

    ``submit``, ``cancel``, ``set_table``, ``describe``, ``status`` and ``drain`` may be called from any
    thread; ``on_done`` is called from the service's own thread and must not block.

    Args:
        layers: The layers, by name.
        transport: Carries rows to the expert hosts; owned by the service from now on.
        router: Limits of the batcher and its queue.
        limits: Limits of one request.
        node: Name of the router's node.
        clock: Tells the time.
    """

    def __init__(
        self,
        layers: Mapping[str, RoutedLayer],
        transport: Transport,
        *,
        router: RouterConfig,
        limits: LimitsConfig,
        node: str = "",
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._router = router
        self._limits = limits
        self._transport = transport
        self._engine = RouterEngine(layers, transport, node=node, clock=self._clock)
        self._budget = QueueBudget(
            max_tokens=router.max_queued_tokens, max_bytes=router.max_queued_bytes, clock=self._clock
        )
        self._batcher = Batcher(layers, router=router, budget=self._budget, clock=self._clock)
        self._inbox = Inbox(transport.wake, max_open_requests=limits.max_concurrent_requests)
        self._pending: dict[int, PendingRequest] = {}
        self._batches: dict[int, JoinedBatch] = {}
        self._keys = itertools.count(1)
        self._stopping = threading.Event()
        self._started_at = self._clock.now()
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), name="moe-router-engine", daemon=True
        )

    def start(self) -> None:
        """Start the service's thread."""
        self._thread.start()

    def submit(self, request: LayerRequest, on_done: OnDone) -> Ticket:
        """Take a request in, after checking it in the caller's thread.

        Args:
            request: The request.
            on_done: Called once, from the service's thread, with the answer or the error.

        Returns:
            What ``cancel`` takes.

        Raises:
            InvalidRequestError: If the request can never be right.
            DeadlineExceededError: If its deadline has passed.
            OverloadedError: If the queue is full.
            UnavailableError: If the service is draining or closed.
        """
        try:
            return self._accept(request, on_done)
        except (OverloadedError, UnavailableError):
            self._engine.stats.num_refused += 1
            raise

    def cancel(self, ticket: Ticket) -> None:
        """Withdraw a request; its ``on_done`` gets ``RequestCancelledError`` unless it was answered already."""
        self._inbox.post(lambda: self._withdraw(ticket.request_key))

    def set_table(self, table: RoutingTable) -> None:
        """Use a routing table from the next batch on; an older one than the present is ignored."""
        self._inbox.post(lambda: self._engine.set_table(table))

    def layer(self, name: str) -> RoutedLayer:
        """The layer of that name.

        Raises:
            UnknownLayerError: If there is none.
        """
        try:
            return self._engine.layers[name]
        except KeyError:
            known = ", ".join(sorted(self._engine.layers))
            raise UnknownLayerError(f"expected one of the layers {known}, found {name!r}") from None

    def describe(self) -> dict[str, Any]:
        """Layers, experts and their replicas, as plain values."""
        table = self._engine.table
        return {
            "table_version": table.version,
            "layers": {name: describe_layer(layer, table) for name, layer in self._engine.layers.items()},
        }

    def status(self) -> dict[str, Any]:
        """Counters, queue depths and uptime, as plain values."""
        snapshot = self._engine.stats.snapshot()
        for name, layer in snapshot["layers"].items():
            layer.update(self._batcher.depth(name))
        return {
            **snapshot,
            "table_version": self._engine.table.version,
            "uptime_s": self._clock.now() - self._started_at,
            "open_requests": self._inbox.num_open,
            "draining": self._inbox.is_closed,
        }

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the open ones; True if all were answered in time."""
        self._inbox.close()
        return self._inbox.wait_until_empty(timeout_s)

    def close(self) -> None:
        """Stop: whatever is still open is answered with ``UnavailableError``. Safe to call twice."""
        self._inbox.close()
        self._stopping.set()
        self._transport.wake()
        if self._thread.ident is None:
            self._shut()
        else:
            self._thread.join()

    def _accept(self, request: LayerRequest, on_done: OnDone) -> Ticket:
        layer = self.layer(request.layer)
        validate_request(request, layer, limits=self._limits, router=self._router)
        now = self._clock.now()
        deadline = now + self._limits.default_timeout_s if request.deadline is None else request.deadline
        if deadline <= now:
            raise DeadlineExceededError(f"request {request.request_id}: its deadline passed before it was queued")
        pending = PendingRequest(next(self._keys), request, on_done, now, deadline, unused_options(request))
        self._inbox.take_in(
            lambda: self._queue(pending),
            reserve=lambda: self._budget.reserve(int(request.tokens.shape[0]), request.tokens.nbytes),
        )
        return Ticket(pending.request_key)

    def _run(self, num_threads: int) -> None:
        # OpenMP keeps the number per thread: the gate's last bits should be those of the thread that made this.
        torch.set_num_threads(num_threads)
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception:
            _LOG.exception("the router's engine failed; open requests are answered with an error")
        finally:
            self._shut()

    def _turn(self) -> None:
        self._inbox.run_all()
        self._expire()
        while (joined := self._batcher.next_batch()) is not None:
            self._dispatch(joined)
        for result in self._engine.poll(self._patience()):
            self._finish(result)

    def _queue(self, pending: PendingRequest) -> None:
        self._engine.stats.num_requests += 1
        self._pending[pending.request_key] = pending
        if pending.request.tokens.shape[0] == 0:
            self._answer_empty(pending)
        else:
            self._batcher.add(QueuedRequest(pending.request_key, pending.request, pending.arrived_at))

    def _answer_empty(self, pending: PendingRequest) -> None:
        layer = self._engine.layers[pending.request.layer]
        report = empty_report(pending.request, table_version=self._engine.table.version, warnings=pending.warnings)
        outputs = pending.request.tokens.new_empty((0, *layer.out_shape))
        self._answer(pending.request_key, LayerAnswer(outputs, report))

    def _dispatch(self, joined: JoinedBatch) -> None:
        try:
            batch_id = self._engine.submit(joined.batch)
        except Exception:
            # A gate that raises must not take the other layers' requests with it.
            _LOG.exception("layer %s: a batch could not be routed", joined.batch.layer)
            self._batcher.batch_done(joined.batch.layer)
            for part in joined.parts:
                self._fail(part.request_key, InternalError("the batch could not be routed; see the router's log"))
            return
        self._batches[batch_id] = joined

    def _finish(self, result: BatchResult) -> None:
        joined = self._batches.pop(result.batch_id, None)
        if joined is None:
            # Its submission failed half-way, and its requests were answered then.
            return
        self._batcher.batch_answered(joined)
        ledger = BatchLedger(result, self._engine.layers[joined.batch.layer])
        for part in joined.parts:
            pending = self._pending.get(part.request_key)
            if pending is None:
                continue
            last_row = part.offset + part.stop - part.start
            report = ledger.part(
                first_row=part.offset,
                last_row=last_row,
                queue_s=joined.joined_at - part.arrived_at,
                return_routing=part.return_routing,
            )
            if pending.add_part(part.start, result.outputs[part.offset : last_row], report):
                self._answer(part.request_key, pending.answer(self._clock.now()))

    def _expire(self) -> None:
        now = self._clock.now()
        for key in [key for key, pending in self._pending.items() if pending.deadline <= now]:
            self._engine.stats.num_deadline_exceeded += 1
            waited_ms = (now - self._pending[key].arrived_at) * 1000.0
            self._fail(key, DeadlineExceededError(f"the deadline passed after {waited_ms:.0f} ms in the router"))

    def _withdraw(self, request_key: int) -> None:
        if request_key in self._pending:
            self._engine.stats.num_cancelled += 1
            self._fail(request_key, RequestCancelledError("the request was cancelled by its caller"))

    def _fail(self, request_key: int, error: MoERuntimeError) -> None:
        pending = self._pending.get(request_key)
        if pending is not None:
            self._engine.stats.num_failed += 1
            self._batcher.remove(request_key, pending.request.layer)
            self._answer(request_key, error)

    def _answer(self, request_key: int, answer: LayerAnswer | MoERuntimeError) -> None:
        pending = self._pending.pop(request_key)
        if isinstance(answer, LayerAnswer):
            self._engine.stats.num_answered += 1
        try:
            pending.on_done(answer)
        except Exception:
            _LOG.exception("request %s: its caller could not take the answer", pending.request.request_id)
        self._inbox.answered()

    def _patience(self) -> float:
        now = self._clock.now()
        waits = [_LONGEST_POLL_S, *(pending.deadline - now for pending in self._pending.values())]
        due_in = self._batcher.seconds_to_next()
        if due_in is not None:
            waits.append(due_in)
        return max(0.0, min(waits))

    def _shut(self) -> None:
        self._inbox.close()
        self._inbox.run_rest()
        for key in list(self._pending):
            self._fail(key, UnavailableError("the router was shut down before the answer was ready"))
        self._transport.close()
