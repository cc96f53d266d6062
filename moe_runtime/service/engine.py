"""One batch's way: gate, policy, capacity, plan, dispatch; then receive, combine, residual."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import TransportError
from moe_runtime.experts.outputs import non_finite_rows
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.service.batch import BatchResult, StageTimes
from moe_runtime.service.dispatch import fault_in, split_by_host
from moe_runtime.service.flight import Flight, SentMessage
from moe_runtime.service.lineup import Lineup
from moe_runtime.service.ports import HostLost, HostReply, HostRequest, MonotonicClock
from moe_runtime.service.row_buffers import ExpertRows, RowBuffers
from moe_runtime.service.stats import RouterStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.dispatch import HostMessage
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Clock, Endpoint, Transport
    from moe_runtime.service.routing_table import RoutingTable

#: Up to this many bytes of a batch, one pass over its rows is quicker than one per host.
_GATHER_AT_ONCE_BYTES = 64 << 10


class RouterEngine:
    """Routes batches through expert hosts, several in flight at once.

    Synchronous and owned by one thread: no method may be called from another. ``submit`` never waits;
    ``poll`` waits for hosts and returns what is finished, in any order. Every submitted batch comes back
    exactly once, at the latest ``timeout_s`` of its layer after its dispatch: what an expert did not serve
    by then is dropped, counted, and left to the residual.

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
        self._node = node
        self._clock = clock or MonotonicClock()
        self._batch_ids = itertools.count(1)
        self._tickets = itertools.count(1)
        self._sent: dict[int, SentMessage] = {}
        self._flights: dict[int, Flight] = {}
        self._answered: list[Flight] = []
        self._row_buffers = RowBuffers()
        self._outstanding_rows: dict[str, int] = {}

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
            self._give_up(endpoint, "its host is out")
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

    @torch.inference_mode()
    def submit(self, batch: Batch, lineup: Lineup | None = None) -> int:
        """Route a batch, by the present line-up or a replaced one, and send its rows to the experts.

        Returns:
            The batch's id, which comes back in its result.
        """
        started_at, lineup = self._clock.now(), lineup or self.lineup
        layer = lineup.layers[batch.layer]
        gate_input = batch.tokens.flatten(1) if batch.gate_input is None else batch.gate_input
        router_logits = layer.gate(gate_input)
        assignments = layer.policy.assign(router_logits, k=batch.k, mask=batch.mask)
        admission = admit(assignments, layer.capacity, row_seeds=batch.row_seeds)
        plan = plan_dispatch(admission)
        flight = self._take_off(batch, lineup, plan, started_at)
        self._dispatch(flight)
        return flight.batch_id

    @torch.inference_mode()
    def poll(self, timeout_s: float) -> list[BatchResult]:
        """Finished batches; waits up to ``timeout_s`` for hosts, less when one is done or the transport is woken."""
        for event in self._transport.poll(self._patience(timeout_s)):
            if isinstance(event, HostLost):
                self._give_up(event.endpoint, event.reason)
            else:
                self._receive(event)
        self._expire()
        answered, self._answered = self._answered, []
        return [self._finish(flight) for flight in answered]

    def _retain(self) -> None:
        endpoints = {sent.message.endpoint for sent in self._sent.values()}
        self._transport.retain(endpoints.union(*(each.table.endpoints() for each in (self.lineup, *self._replaced))))

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
        )
        self._flights[flight.batch_id] = flight
        return flight

    def _dispatch(self, flight: Flight) -> None:
        dispatch = split_by_host(
            flight.plan.rows_per_expert,
            flight.table,
            layer=flight.layer.name,
            node=self._node,
            outstanding_rows=self._outstanding_rows,
        )
        flight.fail(dispatch.unreachable, "no replica is ready")
        timeout_s = flight.deadline - self._clock.now()
        for message, rows in self._gather(flight, dispatch.messages):
            self._send(flight, message, rows, timeout_s=timeout_s)
        if not flight.num_unanswered:
            self._answered.append(flight)

    def _gather(self, flight: Flight, messages: Iterable[HostMessage]) -> Iterator[tuple[HostMessage, Tensor]]:
        """Each message with its rows: large ones straight into the transport's memory, small ones all at once."""
        layer, plan = flight.layer, flight.plan
        gather = partial(gather_rows, flight.batch.tokens, plan, weight_on=layer.weight_on)
        if plan.num_planned * layer.item_size * layer.row_dtype.itemsize <= _GATHER_AT_ONCE_BYTES:
            every_row = gather().to(layer.row_dtype)
            for message in messages:
                yield message, every_row[message.planned_ids()]
            return
        for message in messages:
            shape = (message.num_rows, *layer.item_shape)
            memory = self._transport.allocate(message.endpoint, shape, layer.row_dtype)
            yield message, gather(planned_ids=message.planned_ids(), out=memory)

    def _send(self, flight: Flight, message: HostMessage, rows: Tensor, *, timeout_s: float) -> None:
        ticket = next(self._tickets)
        request = HostRequest(ticket, message.wire_segments(), rows, timeout_s, flight.batch.request_ids)
        try:
            self._transport.send(message.endpoint, request)
        except TransportError as exc:
            self.stats.num_send_errors += 1
            flight.fail(message.segments, str(exc))
            return
        self.stats.num_messages += 1
        self.stats.num_bytes_sent += rows.nbytes
        flight.num_unanswered += 1
        self._sent[ticket] = SentMessage(flight, message)
        outstanding = self._outstanding_rows
        for _, start, stop, replica_id in message.segments:
            outstanding[replica_id] = outstanding.get(replica_id, 0) + stop - start

    def _receive(self, reply: HostReply) -> None:
        sent = self._land(reply.ticket)
        if sent is None:
            self.stats.num_late_replies += 1
            return
        flight, segments = sent.flight, sent.message.segments
        fault = fault_in(reply, segments, out_shape=flight.layer.out_shape, dtype=flight.layer.row_dtype)
        if fault is not None:
            flight.fail(segments, fault)
            return
        stats, taken_s = flight.stats, self._clock.now() - flight.dispatched_at
        if reply.rows is not None:
            self.stats.num_bytes_received += reply.rows.nbytes
        if len(segments) == 1 and reply.rows is not None:
            flight.expert_rows.place(segments[0].start, reply.rows)
            stats.count_product(segments[0].expert_id, reply.results[0].compute_ms, taken_s=taken_s)
            return
        start = 0
        for segment, result in zip(segments, reply.results, strict=True):
            if result.error is not None or reply.rows is None:
                flight.fail((segment,), result.error or "no rows")
                continue
            flight.expert_rows.place(segment.start, reply.rows.narrow(0, start, segment.num_rows))
            stats.count_product(segment.expert_id, result.compute_ms, taken_s=taken_s)
            start += segment.num_rows

    def _land(self, ticket: int) -> SentMessage | None:
        """Take a message off the list of those that are waited for; the last one lands its batch."""
        sent = self._sent.pop(ticket, None)
        if sent is None:
            return None
        flight, message = sent
        for _, start, stop, replica_id in message.segments:
            self._outstanding_rows[replica_id] -= stop - start
        flight.num_unanswered -= 1
        if not flight.num_unanswered:
            self._answered.append(flight)
        return sent

    def _give_up(self, endpoint: Endpoint, reason: str) -> None:
        lost = [ticket for ticket, sent in self._sent.items() if sent.message.endpoint == endpoint]
        self._abandon(lost, reason)

    def _expire(self) -> None:
        now = self._clock.now()
        if any(flight.deadline <= now for flight in self._flights.values()):
            late = [ticket for ticket, sent in self._sent.items() if sent.flight.deadline <= now]
            self._abandon(late, "no answer within the layer's timeout_ms")

    def _abandon(self, tickets: Iterable[int], reason: str) -> None:
        for ticket in tickets:
            sent = self._land(ticket)
            if sent is not None:
                sent.flight.fail(sent.message.segments, reason)

    def _patience(self, timeout_s: float) -> float:
        if self._answered:
            return 0.0
        nearest = min([flight.deadline for flight in self._flights.values()], default=math.inf)
        return max(0.0, min(timeout_s, nearest - self._clock.now()))

    def _finish(self, flight: Flight) -> BatchResult:
        layer, answered_at = flight.layer, self._clock.now()
        combined = combine(
            flight.batch.tokens,
            flight.expert_rows.collect(),
            flight.plan,
            residual=layer.residual,
            weight_on=layer.weight_on,
            served=flight.served(),
            exact=layer.exact,
        )
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
            overflowed=None if layer.allow_non_finite else non_finite_rows(combined.outputs),
        )
        flight.stats.count_batch(result)
        return result
