"""An engine whose hosts a test drives: it sees what was sent, and says what is answered."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fakes.service import FakeClock, FakeTransport, endpoint
from moe_runtime.service.batch import Batch, BatchResult
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import HostReply, HostRequest, SegmentResult
from moe_runtime.service.report import BatchLedger
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.wire.messages import Report


class DrivenRouter:
    """An engine with its fakes; the host of expert e multiplies rows by ``scale(e)``."""

    def __init__(
        self, layer: RoutedLayer, table: RoutingTable, *, scale: Callable[[int], float], node: str = ""
    ) -> None:
        self.layer = layer
        self.scale = scale
        self.clock = FakeClock()
        self.transport = FakeTransport()
        self.engine = RouterEngine({"layer": layer}, self.transport, node=node, clock=self.clock)
        self.engine.set_table(table)

    def submit(self, tokens: torch.Tensor, logits: torch.Tensor, **options: object) -> torch.Tensor:
        self.engine.submit(Batch("layer", tokens, gate_input=logits, **options))
        return tokens

    @property
    def hosts(self) -> list[int]:
        return [where.incarnation for where, _ in self.transport.sent]

    def sent_to(self, host: int) -> HostRequest:
        """The oldest request that a host has; it has it no longer."""
        for each in self.transport.sent:
            if each[0] == endpoint(host):
                self.transport.sent.remove(each)
                return each[1]
        raise AssertionError(self.hosts)

    def answer(self, request: HostRequest) -> None:
        parts = request.rows.split([segment.num_rows for segment in request.segments])
        experts = [int(segment.replica_id.split("/")[1]) for segment in request.segments]
        rows = [self.scale(expert) * part for expert, part in zip(experts, parts, strict=True)]
        results = tuple(SegmentResult(s.replica_id, s.num_rows, compute_ms=1.0) for s in request.segments)
        self.transport.arrivals.append(HostReply(request.ticket, results, torch.cat(rows)))

    def fail(self, request: HostRequest) -> None:
        results = tuple(SegmentResult(s.replica_id, s.num_rows, error="it raised") for s in request.segments)
        self.transport.arrivals.append(HostReply(request.ticket, results, None))

    def finish(self) -> BatchResult:
        """The result, after all hosts have answered what they have."""
        while True:
            while self.transport.sent:
                self.answer(self.transport.sent.pop(0)[1])
            results = self.engine.poll(0.0)
            if results:
                (result,) = results
                return result

    def report(self, result: BatchResult, *, rows: range | None = None) -> Report:
        rows = rows or range(result.outputs.shape[0])
        ledger = BatchLedger(result, self.layer)
        return ledger.part(first_row=rows.start, last_row=rows.stop, queue_s=0.0, return_routing=True)
