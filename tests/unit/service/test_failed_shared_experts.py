"""A shared expert that fails is asked at another replica, then dropped or an error: its rows go to no other expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fakes.driven_router import DrivenRouter
from fakes.service import GivenLogits, endpoint, logits_for, make_layer, replica, tokens_of
from moe_runtime.config.models import OnFailureConfig
from moe_runtime.errors import ExpertError
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.service.describe import describe_layer
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import HostLost
from moe_runtime.service.report import BatchLedger, PartReport, merge_parts
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.wire.messages import Report

#: Experts 0, 1 and 2 are routed to, 3 is shared; expert e is on host 10 + e, and the shared one on host 23 as well.
SHARED = 3
TABLE = RoutingTable(
    1, {("layer", e): (replica(e, 10 + e), *([replica(e, 23, n=1)] if e == SHARED else [])) for e in range(4)}
)
ALONE = RoutingTable(1, {("layer", e): (replica(e, 10 + e),) for e in range(4)})


class GatesShared(GivenLogits):
    """Weighs the shared expert by half of the first logit."""

    shared_weight = torch.zeros(1, 3)

    def shared_weights(self, gate_input: torch.Tensor) -> torch.Tensor:
        return gate_input[:, :1] / 2


def shared_layer(*order: str, **changes: Any) -> RoutedLayer:
    on_failure = OnFailureConfig(order=order or ("replica", "reroute", "drop"))
    return make_layer(4, num_shared=1, policy=make_layer(3).policy, gate_features=3, on_failure=on_failure, **changes)


def router_of(layer: RoutedLayer, table: RoutingTable = TABLE) -> DrivenRouter:
    return DrivenRouter(layer, table, scale=lambda expert: 10.0**expert)


def shared_counts(report: Report) -> tuple[int, int]:
    assert report.num_assignments == report.num_served + report.num_dropped_capacity + report.num_dropped_failure
    return report.num_shared_served, report.num_shared_dropped


def approx(rows: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(rows, expected, rtol=1e-5)


def test_every_token_goes_to_the_shared_expert_in_one_message_of_its_host() -> None:
    router = router_of(shared_layer())
    tokens = router.submit(tokens_of(3), logits_for(0, 0, 2, num_experts=3))
    assert router.hosts == [10, 12, 13]
    assert torch.equal(router.transport.sent[2][1].rows, tokens)
    result = router.finish()
    assert approx(result.outputs, tokens * torch.tensor([1001.0, 1001.0, 1100.0])[:, None])
    report = router.report(result)
    assert (report.num_assignments, report.num_served) == (3, 3)
    assert shared_counts(report) == (3, 0)
    assert report.expert_ids is not None
    assert report.shared_weights is not None
    assert report.expert_ids.tolist() == [0, 0, 2]
    assert report.shared_weights.tolist() == [[1.0], [1.0], [1.0]]


def test_the_gate_weighs_it_and_padding_is_not_sent_to_it() -> None:
    router = router_of(shared_layer(gate=GatesShared()))
    logits = torch.tensor([[1.0, 0, 0], [0.5, 9, 0], [2.0, 0, 9]])
    tokens = router.submit(tokens_of(3), logits, info=TokenInfo(mask=torch.tensor([True, False, True])))
    result = router.finish()
    assert approx(result.outputs, tokens * torch.tensor([1 + 0.5 * 1000, 0.0, 100 + 1000.0])[:, None])
    report = router.report(result)
    assert shared_counts(report) == (2, 0)
    assert report.shared_weights is not None
    assert report.shared_weights.tolist() == [[0.5], [0.0], [1.0]]


def test_a_failed_shared_expert_is_asked_at_its_other_replica() -> None:
    router = router_of(shared_layer())
    tokens = router.submit(tokens_of(2), logits_for(0, 1, num_experts=3))
    router.fail(router.sent_to(13))
    router.engine.poll(0.0)
    assert router.hosts == [10, 11, 23]
    result = router.finish()
    assert approx(result.outputs, tokens * torch.tensor([1001.0, 1010.0])[:, None])
    report = router.report(result)
    assert shared_counts(report) == (2, 0)
    # What the policy asked for went as it should: nothing of it was tried twice.
    assert (report.num_retried, report.num_rerouted, report.num_dropped_failure) == (0, 0, 0)
    assert report.warnings == ("expert expert-3: it raised; served by another replica",)
    assert router.engine.stats.layers["layer"].experts[SHARED].num_retried == 2


@pytest.mark.parametrize("order", [("reroute", "drop"), ("replica", "reroute", "drop"), ("drop",)])
def test_without_another_replica_it_is_dropped_and_never_rerouted(order: Sequence[str]) -> None:
    router = router_of(shared_layer(*order), ALONE)
    tokens = router.submit(tokens_of(2), logits_for(0, 1, num_experts=3))
    router.fail(router.sent_to(13))
    router.engine.poll(0.0)
    assert router.hosts == [10, 11]
    result = router.finish()
    assert approx(result.outputs, tokens * torch.tensor([1.0, 10.0])[:, None])
    report = router.report(result)
    assert shared_counts(report) == (0, 2)
    assert (report.num_served, report.num_dropped_failure, report.num_rerouted) == (2, 0, 0)
    assert report.warnings == ("expert expert-3: it raised",)
    assert report.shared_weights is not None
    assert report.shared_weights.tolist() == [[0.0], [0.0]]
    stats = router.engine.stats.layers["layer"]
    assert (stats.experts[SHARED].num_dropped_failure, stats.totals.num_rerouted) == (2, 0)


def test_where_the_order_ends_in_an_error_its_request_fails() -> None:
    router = router_of(shared_layer("reroute", "error"), ALONE)
    router.submit(tokens_of(2), logits_for(0, 1, num_experts=3), row_starts=(0, 1), request_ids=("a", "b"))
    router.fail(router.sent_to(13))
    result = router.finish()
    assert sorted(result.errors) == [0, 1]
    assert isinstance(result.errors[0], ExpertError)
    assert str(result.errors[0]) == "layer layer: expert expert-3: it raised"


def test_an_unreachable_shared_expert_is_dropped_at_once() -> None:
    router = router_of(shared_layer(), RoutingTable(1, {("layer", e): (replica(e, 10 + e),) for e in range(3)}))
    router.submit(tokens_of(2), logits_for(0, 1, num_experts=3))
    assert router.hosts == [10, 11]
    report = router.report(router.finish())
    assert shared_counts(report) == (0, 2)
    assert report.warnings == ("expert expert-3: no replica is ready",)


def test_a_failed_routed_expert_never_reroutes_to_a_shared_one() -> None:
    router = router_of(shared_layer(), ALONE)
    tokens = router.submit(tokens_of(1), torch.tensor([[9.0, 8, 7]]))
    for host in (10, 11, 12):
        router.fail(router.sent_to(host))
        router.engine.poll(0.0)
    # Two other experts were tried, as many as the layer allows; the shared one has its own row alone.
    assert router.hosts == [13]
    assert torch.equal(router.transport.sent[0][1].rows, tokens)
    result = router.finish()
    report = router.report(result)
    assert (report.num_dropped_failure, *shared_counts(report)) == (1, 1, 0)
    assert approx(result.outputs, 1000 * tokens)


def test_a_rerouted_token_keeps_its_shared_expert_at_its_weight() -> None:
    router = router_of(shared_layer(gate=GatesShared()), ALONE)
    tokens = router.submit(tokens_of(1), torch.tensor([[1.0, 0.5, 0.2]]))
    router.fail(router.sent_to(10))
    router.engine.poll(0.0)
    result = router.finish()
    assert approx(result.outputs, tokens * (10.0 + 0.5 * 1000))
    report = router.report(result)
    assert (report.num_rerouted, *shared_counts(report)) == (1, 1, 0)


def test_a_token_that_only_its_shared_expert_served_does_not_pass_through() -> None:
    router = router_of(shared_layer("drop", residual="passthrough"), ALONE)
    tokens = router.submit(tokens_of(2), logits_for(0, 1, num_experts=3))
    router.fail(router.sent_to(10))
    assert approx(router.finish().outputs, tokens * torch.tensor([1000.0, 1010.0])[:, None])


def test_a_token_that_nobody_served_passes_through() -> None:
    router = router_of(shared_layer("drop", residual="passthrough"), ALONE)
    tokens = router.submit(tokens_of(2), logits_for(0, 1, num_experts=3))
    router.fail(router.sent_to(10))
    router.fail(router.sent_to(13))
    assert approx(router.finish().outputs, tokens * torch.tensor([1.0, 10.0])[:, None])


def test_time_is_kept_for_a_second_attempt_only_where_there_may_be_one() -> None:
    for table, timeout_s in ((TABLE, 1.0), (ALONE, 2.0)):
        router = router_of(shared_layer(), table)
        router.submit(tokens_of(1), logits_for(0, num_experts=3))
        # The routed expert has others to go to; the shared one has a second replica, or nothing.
        assert {where.incarnation: each.timeout_s for where, each in router.transport.sent} == {10: 1.0, 13: timeout_s}


def test_a_shared_expert_is_no_place_to_go_to_when_time_is_divided() -> None:
    table = RoutingTable(1, {("layer", e): (replica(e, 10 + e),) for e in (0, SHARED)})
    router = router_of(shared_layer(), table)
    router.submit(tokens_of(1), logits_for(0, num_experts=3))
    assert [request.timeout_s for _, request in router.transport.sent] == [2.0, 2.0]


def test_a_host_that_dies_of_shared_rows_is_no_reason_to_poison_the_batch() -> None:
    router = router_of(shared_layer())
    tokens = router.submit(tokens_of(1), logits_for(0, num_experts=3))
    router.sent_to(13)
    router.transport.arrivals.append(HostLost(endpoint(13), "it died"))
    router.engine.poll(0.0)
    assert router.hosts == [10, 23]
    assert approx(router.finish().outputs, 1001 * tokens)


def test_the_balance_of_a_batch_is_that_of_its_routed_experts() -> None:
    router = router_of(shared_layer())
    router.submit(tokens_of(3), logits_for(0, 1, 2, num_experts=3))
    router.finish()
    stats = router.engine.stats.layers["layer"]
    assert stats.histograms.load_ratio.sum == 1.0
    assert [expert.num_served for expert in stats.experts] == [1, 1, 1, 3]


def test_a_layer_says_which_of_its_experts_are_shared() -> None:
    described = describe_layer(shared_layer(), TABLE)
    assert (described["num_shared"], described["k"]) == (1, 1)
    assert [expert["shared"] for expert in described["experts"]] == [False, False, False, True]
    assert (described["tasks"], described["default_task"]) == ([], None)


def test_requests_of_one_batch_get_the_shared_rows_of_their_own() -> None:
    router = router_of(shared_layer(gate=GatesShared()), ALONE)
    router.submit(tokens_of(3), torch.tensor([[1.0, 0, 0], [1.5, 0, 0], [2.0, 0, 0]]))
    result = router.finish()
    first, rest = router.report(result, rows=range(1)), router.report(result, rows=range(1, 3))
    assert (shared_counts(first), shared_counts(rest)) == ((1, 0), (2, 0))
    assert rest.shared_weights is not None
    assert rest.shared_weights.tolist() == [[0.75], [1.0]]
    ledger = BatchLedger(result, router.layer)
    bare = ledger.part(first_row=0, last_row=3, queue_s=0.0, return_routing=False)
    assert (bare.shared_weights, bare.num_shared_served) == (None, 3)


def test_shared_counts_and_weights_of_a_split_request_are_joined() -> None:
    router = router_of(shared_layer(gate=GatesShared()), ALONE)
    router.submit(tokens_of(2), torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]))
    result = router.finish()
    parts = [PartReport(row, router.report(result, rows=range(row, row + 1))) for row in range(2)]
    merged = merge_parts("r", parts, total_s=0.0)
    assert shared_counts(merged) == (2, 0)
    assert merged.shared_weights is not None
    assert merged.shared_weights.tolist() == [[0.5], [1.0]]
