"""The engine's way of one batch, with a scripted transport and a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from fakes.service import (
    FakeClock,
    FakeTransport,
    endpoint,
    logits_for,
    make_layer,
    replica,
    table_of,
    tokens_of,
)
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.service.batch import Batch, BatchResult
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import HostLost, HostReply, SegmentResult
from moe_runtime.service.report import BatchLedger
from moe_runtime.service.routing_table import ReplicaState, RoutingTable


class Bench:
    """An engine with its fakes."""

    def __init__(self, layer: RoutedLayer, table: RoutingTable) -> None:
        self.clock = FakeClock()
        self.transport = FakeTransport()
        self.engine = RouterEngine({layer.name: layer}, self.transport, node="here", clock=self.clock)
        self.engine.set_table(table)

    def submit(self, tokens: torch.Tensor, logits: torch.Tensor, **options: object) -> int:
        return self.engine.submit(Batch("layer", tokens, gate_input=logits, **options))

    def answer_all(self) -> None:
        for _, request in self.transport.sent:
            self.transport.answer(request)
        self.transport.sent.clear()

    @property
    def experts(self) -> list[tuple[int, int, int]]:
        stats = self.engine.stats.layers["layer"].experts
        return [(e.num_served, e.num_dropped_capacity, e.num_dropped_failure) for e in stats]


DROP = OnFailureConfig(order=("drop",))


def reasons(result: BatchResult) -> dict[int, str]:
    """Why each expert failed, the last time."""
    return {} if result.failures is None else {each.expert_id: each.reason for each in result.failures.attempts}


def test_rows_go_to_the_chosen_experts_and_come_back_in_order() -> None:
    bench = Bench(make_layer(), table_of(1, 10, 11))
    tokens = tokens_of(4)
    batch_id = bench.submit(tokens, logits_for(1, 0, 1, 0))
    sent = {where: request.rows for where, request in bench.transport.sent}
    assert torch.equal(sent[endpoint(10)], tokens[[1, 3]])
    assert torch.equal(sent[endpoint(11)], tokens[[0, 2]])
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert result.batch_id == batch_id
    assert torch.allclose(result.outputs, 2.0 * tokens)
    assert result.table_version == 1
    assert bench.experts == [(2, 0, 0), (2, 0, 0)]
    assert bench.engine.num_in_flight == 0


def test_experts_of_one_host_share_one_message() -> None:
    bench = Bench(make_layer(4, k=2), table_of(1, 10, 11, 10, 11))
    bench.submit(tokens_of(3), torch.tensor([[9.0, 8, 0, 0], [0, 0, 9, 8], [9, 0, 8, 0]]))
    assert len(bench.transport.sent) == 2
    segments = {where: [(s.replica_id, s.num_rows) for s in r.segments] for where, r in bench.transport.sent}
    assert segments[endpoint(10)] == [("layer/0/0", 2), ("layer/2/0", 2)]
    assert segments[endpoint(11)] == [("layer/1/0", 1), ("layer/3/0", 1)]
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs, 2.0 * tokens_of(3))


def test_answers_are_combined_with_the_gate_weights() -> None:
    bench = Bench(make_layer(2, k=2), table_of(1, 10, 11))
    tokens = tokens_of(1)
    bench.submit(tokens, torch.tensor([[0.0, 0.0]]))
    (_, first), (_, second) = bench.transport.sent
    bench.transport.answer(first, times=4.0)
    bench.transport.answer(second, times=0.0)
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs, 0.5 * 4.0 * tokens)


def test_weights_on_the_input_scale_what_the_experts_see() -> None:
    bench = Bench(make_layer(2, k=2, weight_on="input"), table_of(1, 10, 11))
    tokens = tokens_of(1)
    bench.submit(tokens, torch.tensor([[0.0, 0.0]]))
    assert all(torch.allclose(request.rows, 0.5 * tokens) for _, request in bench.transport.sent)
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs, 2.0 * tokens)


def test_batches_finish_in_any_order() -> None:
    bench = Bench(make_layer(), table_of(1, 10, 11))
    first = bench.submit(tokens_of(1), logits_for(0))
    second = bench.submit(tokens_of(2), logits_for(0, 0))
    (_, early), (_, late) = bench.transport.sent
    bench.transport.answer(late)
    assert [result.batch_id for result in bench.engine.poll(0.0)] == [second]
    bench.transport.answer(early)
    assert [result.batch_id for result in bench.engine.poll(0.0)] == [first]


def test_an_expert_without_a_replica_costs_only_its_own_rows() -> None:
    bench = Bench(
        make_layer(residual="passthrough", on_failure=DROP), RoutingTable(1, {("layer", 0): (replica(0, 10),)})
    )
    tokens = tokens_of(2)
    bench.submit(tokens, logits_for(0, 1))
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs[0], 2.0 * tokens[0])
    assert torch.equal(result.outputs[1], tokens[1])
    assert reasons(result) == {1: "no replica is ready"}
    assert bench.experts == [(1, 0, 0), (0, 0, 1)]


def test_a_batch_that_nobody_serves_is_finished_by_the_next_poll() -> None:
    bench = Bench(make_layer(), RoutingTable(1))
    bench.submit(tokens_of(2), logits_for(0, 1))
    (result,) = bench.engine.poll(5.0)
    assert torch.equal(result.outputs, torch.zeros(2, 3))
    assert bench.transport.polled_for == [0.0]


def test_a_message_that_cannot_be_sent_drops_its_rows() -> None:
    bench = Bench(make_layer(on_failure=DROP), table_of(1, 10, 11))
    bench.transport.refusing.add(endpoint(11))
    bench.submit(tokens_of(2), logits_for(0, 1))
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert reasons(result) == {1: "its queue is full"}
    assert result.served.tolist() == [True, False]
    assert bench.engine.stats.num_send_errors == 1


def test_a_late_expert_is_dropped_at_the_layers_timeout_and_its_answer_is_ignored() -> None:
    bench = Bench(make_layer(timeout_s=2.0, on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 1))
    (_, prompt), (_, late) = bench.transport.sent
    bench.transport.answer(prompt)
    bench.clock.advance(1.5)
    assert bench.engine.poll(9.0) == []
    assert bench.transport.polled_for == [0.5]
    bench.clock.advance(0.5)
    (result,) = bench.engine.poll(9.0)
    assert result.served.tolist() == [True, False]
    assert reasons(result) == {1: "no answer within the layer's timeout_ms"}
    bench.transport.answer(late)
    assert bench.engine.poll(0.0) == []
    assert bench.engine.stats.num_late_replies == 1


def test_experts_are_not_asked_for_longer_than_the_last_request_waits() -> None:
    bench = Bench(make_layer(timeout_s=2.0, on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 1), awaited_until=bench.clock.now() + 0.25)
    assert [request.timeout_s for _, request in bench.transport.sent] == [0.25, 0.25]


def test_rows_that_fail_when_nobody_waits_any_more_are_not_tried_again() -> None:
    bench = Bench(make_layer(timeout_s=2.0), table_of(1, 10, 11))
    bench.submit(tokens_of(1), logits_for(0), awaited_until=bench.clock.now() + 0.25)
    bench.clock.advance(0.5)
    ((where, _),) = bench.transport.sent
    bench.transport.sent.clear()
    bench.transport.arrivals.append(HostLost(where, "its process ended", is_death=False))
    (result,) = bench.engine.poll(0.0)
    assert (bench.transport.sent, result.served.tolist()) == ([], [False])


def test_a_lost_host_is_given_up_at_once() -> None:
    bench = Bench(make_layer(on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 1))
    bench.transport.answer(bench.transport.sent[0][1])
    bench.transport.arrivals.append(HostLost(endpoint(11), "its process ended"))
    (result,) = bench.engine.poll(0.0)
    assert reasons(result) == {1: "its process ended"}


def test_a_host_that_the_new_table_declares_out_is_given_up_at_once() -> None:
    bench = Bench(make_layer(on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 1))
    bench.transport.answer(bench.transport.sent[0][1])
    out = replica(1, 11, state=ReplicaState.OUT)
    bench.engine.set_table(RoutingTable(2, {("layer", 0): (replica(0, 10),), ("layer", 1): (out,)}))
    (result,) = bench.engine.poll(0.0)
    assert reasons(result) == {1: "its host is out"}
    assert result.table_version == 1


def test_a_host_that_left_the_table_may_still_answer_the_batch_in_flight() -> None:
    bench = Bench(make_layer(), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 1))
    bench.engine.set_table(table_of(2, 10, 12))
    assert bench.transport.retained == {endpoint(10), endpoint(11), endpoint(12)}
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert result.served.all()


def test_an_older_table_is_ignored() -> None:
    bench = Bench(make_layer(), table_of(5, 10, 11))
    bench.engine.set_table(table_of(4, 20, 21))
    assert bench.engine.table.version == 5


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda r: HostReply(r.ticket, (), r.rows), "its host answered for other rows than it was sent"),
        (lambda r: HostReply(r.ticket, (SegmentResult("layer/9/0", 2),), r.rows), "other rows"),
        (lambda r: HostReply(r.ticket, (SegmentResult("layer/0/0", 2),), r.rows[:1]), "shape (1, 3)"),
        (lambda r: HostReply(r.ticket, (SegmentResult("layer/0/0", 2),), r.rows[:, :2]), "shape (2, 2)"),
        (lambda r: HostReply(r.ticket, (SegmentResult("layer/0/0", 2),), r.rows.double()), "torch.float64"),
        (lambda r: HostReply(r.ticket, (SegmentResult("layer/0/0", 2),), None), "sent no rows, expected 2"),
    ],
)
def test_a_reply_that_does_not_fit_is_the_hosts_fault(spoil, complaint) -> None:
    bench = Bench(make_layer(on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(2), logits_for(0, 0))
    bench.transport.arrivals.append(spoil(bench.transport.sent[0][1]))
    (result,) = bench.engine.poll(0.0)
    assert complaint in reasons(result)[0]
    assert not result.served.any()
    assert torch.isfinite(result.outputs).all()


def test_a_segment_that_failed_leaves_its_neighbours_rows_in_place() -> None:
    bench = Bench(make_layer(3, on_failure=DROP), table_of(1, 10, 10, 10))
    tokens = tokens_of(3)
    bench.submit(tokens, logits_for(0, 1, 2, num_experts=3))
    ((_, request),) = bench.transport.sent
    results = (
        SegmentResult("layer/0/0", 1),
        SegmentResult("layer/1/0", 1, error="it raised ValueError"),
        SegmentResult("layer/2/0", 1),
    )
    bench.transport.arrivals.append(HostReply(request.ticket, results, torch.stack([tokens[0], tokens[2]])))
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs, torch.stack([tokens[0], torch.zeros(3), tokens[2]]))
    assert reasons(result) == {1: "it raised ValueError"}


def test_a_reply_whose_every_segment_failed_carries_no_rows() -> None:
    bench = Bench(make_layer(on_failure=DROP), table_of(1, 10, 11))
    bench.submit(tokens_of(1), logits_for(0))
    ((_, request),) = bench.transport.sent
    results = (SegmentResult("layer/0/0", 1, error="it raised"),)
    bench.transport.arrivals.append(HostReply(request.ticket, results, None))
    (result,) = bench.engine.poll(0.0)
    assert reasons(result) == {0: "it raised"}


def test_rows_go_to_the_replica_with_the_least_outstanding_work() -> None:
    replicas = (replica(0, 10, n=0), replica(0, 11, n=1))
    bench = Bench(make_layer(1), RoutingTable(1, {("layer", 0): replicas}))
    for num_tokens in (3, 1, 1):
        bench.submit(tokens_of(num_tokens), torch.zeros(num_tokens, 1))
    assert [where for where, _ in bench.transport.sent] == [endpoint(10), endpoint(11), endpoint(11)]
    bench.answer_all()
    assert len(bench.engine.poll(0.0)) == 3
    bench.submit(tokens_of(1), torch.zeros(1, 1))
    assert bench.transport.sent[-1][0] == endpoint(10)


def test_a_replica_on_the_routers_own_node_wins_a_tie_and_one_that_is_out_gets_nothing() -> None:
    far, near = replica(0, 10, n=0), replica(0, 11, n=1)
    far = type(far)(far.replica_id, endpoint(10, node="there"))
    out = replica(0, 12, n=2, state=ReplicaState.OUT)
    bench = Bench(make_layer(1), RoutingTable(1, {("layer", 0): (out, far, near)}))
    bench.submit(tokens_of(1), torch.zeros(1, 1))
    assert bench.transport.sent[0][0] == endpoint(11)


def test_capacity_drops_are_counted_at_the_expert_that_was_full() -> None:
    layer = make_layer(capacity=CapacityConfig(factor=1.0, min=1), residual="passthrough")
    bench = Bench(layer, table_of(1, 10, 11))
    tokens = tokens_of(4)
    bench.submit(tokens, logits_for(0, 0, 0, 1))
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert bench.experts == [(2, 1, 0), (1, 0, 0)]
    assert torch.equal(result.outputs[2], tokens[2])


def test_masked_rows_are_not_routed() -> None:
    bench = Bench(make_layer(residual="passthrough"), table_of(1, 10, 11))
    tokens = tokens_of(3)
    bench.submit(tokens, logits_for(0, 0, 0), info=TokenInfo(mask=torch.tensor([True, False, True])))
    assert torch.equal(bench.transport.sent[0][1].rows, tokens[[0, 2]])
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert torch.allclose(result.outputs, torch.stack([2 * tokens[0], tokens[1], 2 * tokens[2]]))


def test_the_gate_sees_the_flattened_tokens_without_a_gate_input() -> None:
    layer = make_layer(3, gate_features=3)
    bench = Bench(layer, table_of(1, 10, 11, 12))
    tokens = logits_for(2, 0, num_experts=3)
    bench.engine.submit(Batch("layer", tokens))
    assert [where for where, _ in bench.transport.sent] == [endpoint(10), endpoint(12)]


def test_stage_times_come_from_the_clock() -> None:
    bench = Bench(make_layer(), table_of(1, 10, 11))
    bench.submit(tokens_of(1), logits_for(0))
    bench.clock.advance(0.25)
    bench.answer_all()
    (result,) = bench.engine.poll(0.0)
    assert result.times.experts_s == 0.25


def test_a_sum_that_leaves_the_dtypes_range_is_told_of_its_rows_alone() -> None:
    bench = Bench(make_layer(residual="add"), table_of(1, 10, 11))
    tokens = torch.tensor([[1.0, 2.0, 3.0], [3e38, 0.0, 0.0]])
    bench.submit(tokens, logits_for(0, 0))
    ((_, request),) = bench.transport.sent
    bench.transport.answer(request, times=1.0)
    (result,) = bench.engine.poll(0.0)
    assert result.overflowed is not None
    assert result.overflowed.tolist() == [False, True]
    ledger = BatchLedger(result, make_layer(residual="add"))
    assert ledger.part(first_row=0, last_row=1, queue_s=0.0, return_routing=False).warnings == ()
    assert ledger.part(first_row=1, last_row=2, queue_s=0.0, return_routing=False).warnings == (
        "1 output rows are not finite: their weighted sum left the range of float32",
    )


def test_large_finite_values_whose_sum_overflows_are_no_overflow() -> None:
    bench = Bench(make_layer(), table_of(1, 10, 11))
    bench.submit(torch.full((2, 3), 3e38), logits_for(0, 0))
    ((_, request),) = bench.transport.sent
    bench.transport.answer(request, times=1.0)
    (result,) = bench.engine.poll(0.0)
    assert result.overflowed is None
