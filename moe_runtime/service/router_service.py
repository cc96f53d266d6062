"""Stands between the gRPC handlers and the engine: one thread that batches, drives the engine and answers."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import (
    DeadlineExceededError,
    MoERuntimeError,
    OverloadedError,
    UnavailableError,
)
from moe_runtime.service.describe import describe_lineup
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.fair_queue import QueuedRequest
from moe_runtime.service.front_door import FrontDoor
from moe_runtime.service.generations import Generations
from moe_runtime.service.open_requests import OpenRequests
from moe_runtime.service.pending import PendingRequest, Ticket
from moe_runtime.service.ports import MonotonicClock
from moe_runtime.service.report import empty_report
from moe_runtime.service.requests import LayerAnswer
from moe_runtime.service.under_way import BatchesUnderWay
from moe_runtime.service.validation import unused_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.service.generations import RouterSetup
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.lineup import Lineup
    from moe_runtime.service.pending import OnDone
    from moe_runtime.service.ports import Clock, Transport
    from moe_runtime.service.requests import LayerRequest
    from moe_runtime.service.routing_table import RoutingTable
    from moe_runtime.service.stats import RouterStats

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
        needs_table: Whether to refuse requests before there is a table, instead of dropping their assignments: somebody
            else may have one.
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
        needs_table: bool = False,
    ) -> None:
        self._needs_table = needs_table
        self._clock = clock or MonotonicClock()
        self._limits = limits
        self._transport = transport
        self._engine = RouterEngine(layers, transport, node=node, clock=self._clock)
        self._door = door = FrontDoor(router, limits=limits, wake=transport.wake, clock=self._clock)
        self._inbox = door.inbox
        self._generations = Generations(
            self._engine.lineup, router, budget=door.budget, stats=door.stats, clock=self._clock
        )
        self._requests = OpenRequests(
            self._engine.stats, queue_stats=door.stats, clock=self._clock, on_answered=self._inbox.answered
        )
        self._under_way = BatchesUnderWay(self._engine, self._requests, clock=self._clock)
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
        self._inbox.post(lambda: self._requests.withdraw(ticket.request_key))

    def set_table(self, table: RoutingTable) -> None:
        """Use a routing table from the next batch on; an older one than the present is ignored."""
        self._inbox.post(lambda: self._engine.set_table(table))

    def replace_setup(self, setup: RouterSetup, table: RoutingTable) -> None:
        """Serve other layers from the next batch on, by a table that was made for them.

        Requests that were taken in before are finished by the layers that they were checked against.
        """
        self._inbox.post(lambda: self._replace_setup(setup, table))

    def oldest_table_version(self, timeout_s: float) -> int:
        """The oldest version of the table that a request may still use.

        Raises:
            TimeoutError: If the service's thread does not say so in time, because it is busy or has ended.
        """
        version: Future[int] = Future()
        self._inbox.post(lambda: version.set_result(self._engine.oldest_table_version()))
        return version.result(timeout_s)

    def next_turn(self) -> Future[None]:
        """Done when the service's thread has come round once more; never, where it has ended."""
        turn: Future[None] = Future()
        self._inbox.post(lambda: turn.set_result(None))
        return turn

    def layer(self, name: str) -> RoutedLayer:
        """The layer of that name.

        Raises:
            UnknownLayerError: If there is none.
        """
        return self._generations.current.lineup.layer(name)

    @property
    def lineup(self) -> Lineup:
        """What it serves now: layers, their table and their counters, which go on counting."""
        return self._generations.current.lineup

    @property
    def num_levels(self) -> int:
        """How deep its layers are nested: 1 where none is an expert of another."""
        return 1 + max((layer.level for layer in self.lineup.layers.values()), default=0)

    @property
    def stats(self) -> RouterStats:
        """Its counters, which go on counting."""
        return self._engine.stats

    def describe(self) -> dict[str, Any]:
        """Layers, experts and their replicas, as plain values."""
        return describe_lineup(self._generations.current.lineup)

    def status(self) -> dict[str, Any]:
        """Counters, queue depths and uptime, as plain values."""
        snapshot = self._engine.stats.snapshot()
        generation = self._generations.current
        for name in snapshot["layers"].keys() & generation.lineup.layers.keys():
            snapshot["layers"][name].update(generation.batcher.depth(name), **self._door.stats.of_layer(name))
        return {
            **snapshot,
            "queue": self._door.load(),
            "table_version": self._engine.table.version,
            "uptime_s": self._clock.now() - self._started_at,
            "open_requests": self._inbox.num_open,
            "draining": self._inbox.is_closed,
            "transport": dataclasses.asdict(self._transport.counters),
        }

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the open ones; True if all were answered in time.

        What experts that are layers of this router ask for meanwhile is taken in, as long as others are open.
        """
        self._inbox.close()
        return self._inbox.wait_until_empty(timeout_s)

    def close(self) -> None:
        """Stop: whatever is still open is answered with ``UnavailableError``. Safe to call twice."""
        self._inbox.shut()
        self._stopping.set()
        self._transport.wake()
        if self._thread.ident is None:
            self._shut()
        else:
            self._thread.join()

    def _accept(self, request: LayerRequest, on_done: OnDone) -> Ticket:
        generation = self._generations.current
        generation.check(request, self._limits)
        if self._needs_table and not self._engine.table.version:
            raise UnavailableError("the router has just started and knows no experts yet; send the request to another")
        now = self._clock.now()
        deadline = now + self._limits.default_timeout_s if request.deadline is None else request.deadline
        if deadline <= now:
            raise DeadlineExceededError(f"request {request.request_id}: its deadline passed before it was queued")
        key, layer = next(self._keys), generation.lineup.layer(request.layer)
        warnings = unused_options(request, layer)
        request = dataclasses.replace(request, deadline=deadline)
        pending = PendingRequest(key, request, on_done, now, deadline, generation, warnings, layer.level)
        self._door.take_in(request, lambda: self._queue(pending), time_left_s=deadline - now, level=layer.level)
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
        self._requests.expire()
        while (due := self._generations.next_batch()) is not None:
            self._under_way.dispatch(*due)
            # Routing it took its time; what has expired or was withdrawn meanwhile is in no further batch.
            self._inbox.run_all()
            self._requests.expire()
        for result in self._engine.poll(self._patience()):
            self._under_way.finish(result)
        for generation in self._generations.take_finished():
            self._engine.let_go(generation.lineup)

    def _replace_setup(self, setup: RouterSetup, table: RoutingTable) -> None:
        self._engine.replace_layers(setup.layers, table)
        self._generations.replace(self._engine.lineup, setup.router)

    def _queue(self, pending: PendingRequest) -> None:
        self._requests.add(pending)
        if pending.generation is not self._generations.current and not self._moves_on(pending):
            return
        if pending.request.tokens.shape[0] == 0:
            self._answer_empty(pending)
        else:
            queued = QueuedRequest(pending.request_key, pending.request, pending.arrived_at, level=pending.level)
            pending.generation.batcher.add(queued)

    def _moves_on(self, pending: PendingRequest) -> bool:
        """Whether a request that was on its way while its layers were replaced is right for the new ones too."""
        request, generation = pending.request, self._generations.current
        try:
            generation.check(request, self._limits)
        except MoERuntimeError as exc:
            self._door.release(request, level=pending.level)
            self._requests.fail(pending.request_key, exc)
            return False
        pending.generation = generation
        return True

    def _answer_empty(self, pending: PendingRequest) -> None:
        layer = pending.generation.lineup.layer(pending.request.layer)
        version, warnings = self._engine.table.version, pending.warnings
        report = empty_report(pending.request, table_version=version, warnings=warnings, num_shared=layer.num_shared)
        outputs = pending.request.tokens.new_empty((0, *layer.out_shape))
        self._requests.answer(pending.request_key, LayerAnswer(outputs, report))

    def _patience(self) -> float:
        waits = (self._generations.seconds_to_next(), self._requests.seconds_to_next_deadline())
        return max(0.0, min([_LONGEST_POLL_S, *(wait_s for wait_s in waits if wait_s is not None)]))

    def _shut(self) -> None:
        self._inbox.shut()
        self._inbox.run_rest()
        self._requests.fail_all(UnavailableError("the router was shut down before the answer was ready"))
        self._transport.close()
