"""One batch's way: gate, policy, capacity, plan, dispatch; then receive, combine, residual."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.service.attempts import Attempt, Attempts
from moe_runtime.service.batch import BatchResult, StageTimes
from moe_runtime.service.dispatch import fault_in, split_by_host
from moe_runtime.service.failures import FailureKind
from moe_runtime.service.finishing import combined_of, overflowed
from moe_runtime.service.flight import Flight
from moe_runtime.service.gathering import gather_messages
from moe_runtime.service.hedging import Hedging
from moe_runtime.service.inference import without_gradients
from moe_runtime.service.lineup import Lineup
from moe_runtime.service.ports import HostLost, MonotonicClock
from moe_runtime.service.recovery import Recovery
from moe_runtime.service.replica_choice import ReplicaChoice
from moe_runtime.service.route import route
from moe_runtime.service.row_buffers import ExpertRows, RowBuffers
from moe_runtime.service.stats import RouterStats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.dispatch import HostMessage, PlannedSegment
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Clock, Endpoint, HostReply, SegmentResult, Transport
    from moe_runtime.service.routing_table import RoutingTable


class RouterEngine:
    """Routes batches through expert hosts, several in flight at once.

    Synchronous and owned by one thread: no method may be called from another. ``submit`` never waits;
    ``poll`` waits for hosts and returns what is finished, in any order. Every submitted batch comes back
    exactly once, at the latest ``timeout_s`` of its layer after its dispatch. What an expert does not serve goes on by
    the layer's ``on_failure.order``; what nobody serves in time is dropped, counted, and left to the residual.

    Args:
        layers: The layers, by name.
        transport: Carries rows to the hosts; the engine does not close it.
        node: Name of the router's own node.
        clock: Tells the time.
    """

    def __init__(
        self,
        layers: Mapping[str, RoutedLayer],
        transport: Transport,
        *,
        node: str = "",
        clock: Clock | None = None,
    ) -> None:
        self.lineup = Lineup.of(layers)
        self.stats = RouterStats(self.lineup.stats)
        self._replaced: list[Lineup] = []
        self._transport = transport
        self._clock = clock = clock or MonotonicClock()
        self._batch_ids = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        self._row_buffers = RowBuffers()
        self._choice = ReplicaChoice(node=node, clock=clock)
        self._attempts = Attempts(transport, choice=self._choice, stats=self.stats, clock=clock)
        self._recovery = Recovery(self._attempts, choice=self._choice, stats=self.stats, clock=clock)
        self._hedging = Hedging(self._recovery, choice=self._choice, stats=self.stats)

    @property
    def num_in_flight(self) -> int:
        """Batches submitted and not yet returned."""
        return len(self._flights)

    @property
    def table(self) -> RoutingTable:
        """The one for the batches to come."""
        return self.lineup.table

    def set_table(self, table: RoutingTable) -> None:
        """Use a table for the batches to come; an older one than the present is ignored.

        Batches in flight keep their version, but what they still expect of hosts that the new table
        declares out is given up at once.
        """
        if table.version < self.table.version:
            return
        self.lineup.table = table
        for endpoint in table.out_endpoints():
            self._lose(endpoint, "its host is out", is_death=False)
        self._retain()

    def replace_layers(self, layers: Mapping[str, RoutedLayer], table: RoutingTable) -> None:
        """Use other layers, and their table, for the batches to come; the old line-up works until it is ``let_go``."""
        self._replaced.append(self.lineup)
        self.lineup = self.lineup.replaced_by(layers)
        self.stats.layers = self.lineup.stats
        self.set_table(table)

    def let_go(self, lineup: Lineup) -> None:
        """Nothing more will be submitted with a line-up that was replaced."""
        self._replaced.remove(lineup)
        self._retain()

    def oldest_table_version(self) -> int:
        """The oldest version that a batch in flight uses, or a batch to come may use."""
        lineups = (self.lineup, *self._replaced)
        return min([each.table.version for each in lineups] + [each.table.version for each in self._flights.values()])

    @without_gradients
    def submit(self, batch: Batch, lineup: Lineup | None = None) -> int:
        """Route a batch, by the present line-up or a replaced one, and send its rows to the experts.

        Returns:
            The batch's id, which comes back in its result.
        """
        started_at, lineup = self._clock.now(), lineup or self.lineup
        plan = plan_dispatch(route(batch, lineup))
        flight = self._take_off(batch, lineup, plan, started_at)
        self._dispatch(flight)
        return flight.batch_id

    @without_gradients
    def poll(self, timeout_s: float) -> list[BatchResult]:
        """Finished batches; waits up to ``timeout_s`` for hosts, less when one is done or the transport is woken."""
        for event in self._transport.poll(self._patience(timeout_s)):
            if isinstance(event, HostLost):
                self._lose(event.endpoint, event.reason, is_death=event.is_death)
            else:
                self._receive(event)
        self._look_at_the_clock()
        self._recover()
        return [self._finish(flight) for flight in [*self._flights.values()] if not flight.num_open_rows]

    def _retain(self) -> None:
        tables = [each.table for each in (self.lineup, *self._replaced)]
        endpoints = self._attempts.endpoints().union(*(table.endpoints() for table in tables))
        self._transport.retain(endpoints)
        self._choice.retain(endpoints)

    def _take_off(self, batch: Batch, lineup: Lineup, plan: DispatchPlan, started_at: float) -> Flight:
        now, layer = self._clock.now(), lineup.layers[batch.layer]
        flight = Flight(
            batch_id=next(self._batch_ids),
            batch=batch,
            layer=layer,
            plan=plan,
            table=lineup.table,
            stats=lineup.stats[layer.name],
            expert_rows=ExpertRows((plan.num_planned, *layer.out_shape), layer.dtype, buffers=self._row_buffers),
            gate_s=now - started_at,
            dispatched_at=now,
            deadline=now + layer.timeout_s,
            num_open_rows=plan.num_planned,
        )
        self._flights[flight.batch_id] = flight
        return flight

    def _dispatch(self, flight: Flight) -> None:
        layer, plan = flight.layer, flight.plan
        dispatch = split_by_host(plan.rows_per_expert, flight.table, layer=layer.name, choice=self._choice)
        self._recovery.unreachable(flight, dispatch.unreachable)
        for message, rows in gather_messages(flight, dispatch.messages, self._transport):
            self._send(flight, message, rows)
        self._recover()

    def _send(self, flight: Flight, message: HostMessage, rows: Tensor) -> None:
        now = self._clock.now()
        attempt = Attempt(flight, message, now, now + self._recovery.attempt_s(flight, message.segments, now=now))
        if flight.layer.hedge is not None:
            attempt.hedge_at = now + self._hedging.wait_s(flight.layer, message.segments)
        reason = self._attempts.send(attempt, rows)
        if reason is not None:
            self._recovery.fail(flight, message.segments, reason)

    def _receive(self, reply: HostReply) -> None:
        if reply.is_begun:
            self._attempts.note_begun(reply.ticket)
            return
        attempt = self._attempts.take_answered(reply.ticket)
        if attempt is None:
            return
        flight, segments = attempt.flight, attempt.message.segments
        layer, took_s = flight.layer, self._clock.now() - attempt.sent_at
        if reply.rows is not None:
            self.stats.num_bytes_received += reply.rows.nbytes
        if layer.hedge is not None:
            self._hedging.answered(layer, segments, took_s=took_s)
        fault = fault_in(reply, segments, out_shape=layer.out_shape, dtype=layer.row_dtype)
        if fault is not None:
            self._recovery.fail(flight, segments, fault)
            return
        start = 0
        for segment, result in zip(segments, reply.results, strict=True):
            rows = None
            if result.has_rows and reply.rows is not None:
                rows = reply.rows if len(segments) == 1 else reply.rows.narrow(0, start, len(segment.rows))
                start += len(segment.rows)
            self._settle(flight, segment, result, rows, took_s=took_s)

    def _settle(
        self, flight: Flight, segment: PlannedSegment, result: SegmentResult, rows: Tensor | None, *, took_s: float
    ) -> None:
        """Take what a host says of a segment, unless another host was faster."""
        race = segment.race
        if race is not None and race.is_won:
            return
        if rows is None:
            self._recovery.fail(flight, (segment,), result.error or "no rows", kind=FailureKind.of(result))
            return
        if race is not None:
            race.is_won = True
        if result.failed_rows:
            segment, rows = self._recovery.fail_rows(flight, segment, result, rows)
        flight.expert_rows.place(segment.rows, rows)
        flight.num_open_rows -= len(segment.rows)
        flight.stats.count_product(segment.expert_id, result.compute_ms, taken_s=took_s)

    def _lose(self, endpoint: Endpoint, reason: str, *, is_death: bool) -> None:
        for attempt in self._attempts.take_lost(endpoint):
            if is_death and attempt.waiting is None:
                self._recovery.host_died(attempt.flight, attempt.message.segments, reason, had_begun=attempt.has_begun)
            else:
                self._recovery.fail(attempt.flight, attempt.message.segments, reason)

    def _look_at_the_clock(self) -> None:
        """Give up what is overdue, and ask others for what is slow."""
        now = self._clock.now()
        if now < self._attempts.next_due:
            return
        for attempt in self._attempts.take_slow(now):
            self._hedging.hedge(attempt)
        for attempt in self._attempts.take_overdue(now):
            share = "" if attempt.flight.deadline <= now else "its share of "
            reason = f"no answer within {share}the layer's timeout_ms"
            self._recovery.fail(attempt.flight, attempt.message.segments, reason, kind=FailureKind.TIMED_OUT)

    def _recover(self) -> None:
        while self._recovery.has_work or self._attempts.has_turns:
            for attempt, reason in self._attempts.start_waiting():
                self._recovery.fail(attempt.flight, attempt.message.segments, reason)
            self._recovery.run()

    def _patience(self, timeout_s: float) -> float:
        if (
            self._recovery.has_work
            or self._attempts.has_turns
            or not all(flight.num_open_rows for flight in self._flights.values())
        ):
            return 0.0
        return max(0.0, min(timeout_s, self._attempts.next_due - self._clock.now()))

    def _finish(self, flight: Flight) -> BatchResult:
        answered_at = self._clock.now()
        combined = combined_of(flight)
        times = StageTimes(
            gate_s=flight.gate_s,
            experts_s=answered_at - flight.dispatched_at,
            combine_s=self._clock.now() - answered_at,
        )
        del self._flights[flight.batch_id]
        flight.expert_rows.release()
        result = BatchResult(
            batch_id=flight.batch_id,
            combined=combined,
            table_version=flight.table.version,
            times=times,
            failures=flight.failures,
            overflowed=overflowed(flight, combined),
        )
        flight.stats.count_batch(result)
        return result
