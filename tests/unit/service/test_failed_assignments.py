"""Failed assignments go on by their layer's order: a replica, another expert, the residual, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fakes.driven_router import DrivenRouter
from fakes.service import (
    endpoint,
    logits_for,
    make_layer,
    replica,
    table_of,
    tokens_of,
)
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.config.policies import DensePolicyConfig, TopKPolicyConfig
from moe_runtime.errors import ExpertError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.service.batch import BatchResult
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import Endpoint, HostLost, HostReply, HostRequest, SegmentResult
from moe_runtime.service.routing_table import ReplicaState, RoutingTable

#: Two experts with two replicas each: hosts 10 and 20 serve expert 0, hosts 11 and 21 expert 1.
TWINS = RoutingTable(1, {("layer", e): (replica(e, 10 + e), replica(e, 20 + e, n=1)) for e in range(2)})
#: Three experts with one replica each.
SINGLES = table_of(1, 10, 11, 12)


def order(*steps: str) -> OnFailureConfig:
    return OnFailureConfig(order=steps)


def router_of(layer: RoutedLayer, table: RoutingTable) -> DrivenRouter:
    return DrivenRouter(layer, table, scale=lambda expert: expert + 1, node="here")


def lose(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del request
    router.transport.arrivals.append(HostLost(where, "it was lost", is_death=False))
    return "it was lost"


def die(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del request
    router.transport.arrivals.append(HostLost(where, "it died"))
    return "it died"


def raise_error(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del where
    router.fail(request)
    return "it raised"


def send_other_rows(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del where
    router.transport.arrivals.append(HostReply(request.ticket, (), request.rows))
    return "its host answered for other rows than it was sent"


def hang(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del request, where
    nothing_follows = router.layer.on_failure.order[:-1] == ()
    router.clock.advance(2.0 if nothing_follows else 1.0)
    return "no answer within " + ("" if nothing_follows else "its share of ") + "the layer's timeout_ms"


def declare_out(router: DrivenRouter, request: HostRequest, where: Endpoint) -> str:
    del request
    out = {
        key: tuple(
            type(r)(r.replica_id, r.endpoint, ReplicaState.OUT if r.endpoint == where else r.state) for r in replicas
        )
        for key, replicas in router.engine.table.replicas.items()
    }
    router.engine.set_table(RoutingTable(2, out))
    return "its host is out"


FAILURES = [lose, die, raise_error, send_other_rows, hang, declare_out]
Fail = Callable[[DrivenRouter, HostRequest, Endpoint], str]


@pytest.mark.parametrize("fail", FAILURES)
def test_rows_of_a_failed_replica_are_served_by_its_twin(fail: Fail) -> None:
    router = router_of(make_layer(on_failure=order("replica", "drop")), TWINS)
    tokens = tokens_of(3)
    router.submit(tokens, logits_for(0, 1, 0))
    reason = fail(router, router.sent_to(10), endpoint(10))
    result = router.finish() if fail is not hang else hang_expert_0_only(router)
    assert torch.equal(result.outputs, torch.stack([tokens[0], 2 * tokens[1], tokens[2]]))
    report = router.report(result)
    assert (report.num_served, report.num_retried, report.num_rerouted, report.num_dropped_failure) == (3, 2, 0, 0)
    assert report.warnings == (f"expert expert-0: {reason}; served by another replica",)
    stats = router.engine.stats.layers["layer"].experts
    assert (stats[0].num_served, stats[0].num_retried, stats[0].num_failed_attempts) == (2, 2, 2)
    assert stats[0].num_timed_out == (2 if fail is hang else 0)
    assert (stats[1].num_served, stats[1].num_retried, stats[1].num_failed_attempts) == (1, 0, 0)


def hang_expert_0_only(router: DrivenRouter) -> BatchResult:
    """Let the other host answer in the nick of time."""
    router.answer(router.sent_to(11))
    assert router.engine.poll(0.0) == []
    assert router.hosts == [20]
    return router.finish()


@pytest.mark.parametrize("fail", FAILURES)
def test_rows_of_a_failed_expert_go_to_the_tokens_next_best(fail: Fail) -> None:
    layer = make_layer(3, on_failure=order("replica", "reroute", "drop"))
    router = router_of(layer, SINGLES)
    tokens = tokens_of(2)
    router.submit(tokens, torch.tensor([[9.0, 2, 1], [9.0, 1, 2]]), row_starts=(0, 1), request_ids=("a", "b"))
    reason = fail(router, router.sent_to(10), endpoint(10))
    assert router.engine.poll(0.0) == []
    assert router.hosts == [11, 12]
    result = router.finish()
    assert torch.allclose(result.outputs, torch.stack([2 * tokens[0], 3 * tokens[1]]))
    report = router.report(result)
    assert report.expert_ids is not None
    assert report.expert_ids.tolist() == [1, 2]
    assert (report.num_served, report.num_retried, report.num_rerouted, report.num_dropped_failure) == (2, 0, 2, 0)
    assert report.warnings == (f"expert expert-0: {reason}; rerouted",)
    totals, stats = router.engine.stats.layers["layer"].totals, router.engine.stats.layers["layer"].experts
    assert totals.num_rerouted == 2
    assert [(e.num_served, e.num_rerouted, e.num_failed_attempts) for e in stats] == [(0, 2, 2), (1, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize("fail", FAILURES)
def test_rows_of_a_failed_expert_are_left_to_the_residual(fail: Fail) -> None:
    router = router_of(make_layer(3, on_failure=order("drop"), residual="passthrough"), TWINS)
    tokens = tokens_of(2)
    router.submit(tokens, logits_for(0, 1, num_experts=3))
    if fail is hang:
        router.answer(router.sent_to(11))
        router.engine.poll(0.0)
    reason = fail(router, router.sent_to(10), endpoint(10))
    result = router.finish()
    assert torch.allclose(result.outputs, torch.stack([tokens[0], 2 * tokens[1]]))
    report = router.report(result)
    assert (report.num_served, report.num_retried, report.num_rerouted, report.num_dropped_failure) == (1, 0, 0, 1)
    assert report.warnings == (f"expert expert-0: {reason}",)


@pytest.mark.parametrize("fail", FAILURES)
def test_the_requests_that_own_failed_rows_fail_and_their_batch_mates_do_not(fail: Fail) -> None:
    router = router_of(make_layer(3, on_failure=order("error")), TWINS)
    tokens = tokens_of(4)
    router.submit(
        tokens, logits_for(1, 0, 1, 1, num_experts=3), row_starts=(0, 1, 2), request_ids=("first", "second", "third")
    )
    if fail is hang:
        router.answer(router.sent_to(11))
        router.engine.poll(0.0)
    reason = fail(router, router.sent_to(10), endpoint(10))
    result = router.finish()
    assert {place: str(error) for place, error in result.errors.items()} == {
        1: f"layer layer: expert expert-0: {reason}"
    }
    assert isinstance(result.errors[1], ExpertError)
    assert torch.equal(result.outputs[[0, 2, 3]], 2 * tokens[[0, 2, 3]])


def test_a_replica_that_cannot_be_sent_to_costs_nothing_where_it_has_a_twin() -> None:
    router = router_of(make_layer(), TWINS)
    router.transport.refusing.add(endpoint(10))
    router.submit(tokens_of(2), logits_for(0, 1))
    assert router.hosts == [11, 20]
    assert router.report(router.finish()).num_dropped_failure == 0


def test_an_expert_without_a_replica_is_rerouted_at_once() -> None:
    router = router_of(
        make_layer(3), RoutingTable(1, {("layer", 1): (replica(1, 11),), ("layer", 2): (replica(2, 12),)})
    )
    router.submit(tokens_of(2), torch.tensor([[9.0, 2, 1], [1.0, 9, 2]]))
    assert router.hosts == [11, 11]
    report = router.report(router.finish())
    assert (report.num_served, report.num_rerouted, report.num_retried) == (2, 1, 0)
    assert report.warnings == ("expert expert-0: no replica is ready; rerouted",)


def test_the_order_decides_whether_a_twin_or_another_expert_comes_first() -> None:
    router = router_of(make_layer(on_failure=order("reroute", "replica", "drop")), TWINS)
    router.submit(tokens_of(1), logits_for(0))
    raise_error(router, router.sent_to(10), endpoint(10))
    router.engine.poll(0.0)
    assert router.hosts == [11]


def test_an_assignment_tries_as_many_other_experts_as_the_layer_allows() -> None:
    layer = make_layer(4, capacity=CapacityConfig(max_reroutes=2))
    router = router_of(layer, table_of(1, 10, 11, 12, 13))
    router.submit(tokens_of(1), torch.tensor([[9.0, 8, 7, 6]]))
    for host in (10, 11, 12):
        raise_error(router, router.sent_to(host), endpoint(host))
        results = router.engine.poll(0.0)
    (result,) = results
    report = router.report(result)
    assert (report.num_dropped_failure, report.num_rerouted) == (1, 1)
    assert report.expert_ids is not None
    assert report.expert_ids.tolist() == [2]
    assert report.warnings == tuple(f"expert expert-{e}: it raised" for e in range(3))


def test_a_token_is_never_sent_to_an_expert_that_it_holds() -> None:
    router = router_of(make_layer(3, k=2), SINGLES)
    router.submit(tokens_of(1), torch.tensor([[9.0, 8, 7]]))
    raise_error(router, router.sent_to(10), endpoint(10))
    router.engine.poll(0.0)
    assert router.hosts == [11, 12]
    raise_error(router, router.sent_to(11), endpoint(11))
    router.engine.poll(0.0)
    assert router.hosts == [12]
    assert router.report(router.finish()).num_dropped_failure == 1


def test_rows_are_not_moved_to_an_expert_that_is_full() -> None:
    # Two places each: expert 1 has one free, expert 2 two.
    layer = make_layer(3, capacity=CapacityConfig(factor=1.5, min=1))
    router = router_of(layer, SINGLES)
    router.submit(tokens_of(3), torch.tensor([[9.0, 2, 1], [9.0, 2, 1], [1.0, 9, 2]]))
    raise_error(router, router.sent_to(10), endpoint(10))
    router.engine.poll(0.0)
    report = router.report(router.finish())
    assert report.expert_ids is not None
    assert report.expert_ids.tolist() == [1, 2, 1]


def test_a_policy_without_other_scores_skips_rerouting() -> None:
    layer = make_layer(policy=build_policy(DensePolicyConfig(kind="dense"), num_experts=2))
    router = router_of(layer, table_of(1, 10, 11))
    router.submit(tokens_of(1), torch.tensor([[0.0, 0.0]]))
    raise_error(router, router.sent_to(10), endpoint(10))
    assert router.report(router.finish()).num_dropped_failure == 1


def test_weights_on_the_input_that_would_change_are_not_rerouted() -> None:
    policy = TopKPolicyConfig(k=2, normalize="before_drop")
    layer = make_layer(3, weight_on="input", policy=build_policy(policy, num_experts=3))
    router = router_of(layer, SINGLES)
    router.submit(tokens_of(1), torch.tensor([[2.0, 1.0, 0.0]]))
    raise_error(router, router.sent_to(10), endpoint(10))
    assert router.report(router.finish()).num_dropped_failure == 1


def test_rerouted_rows_carry_the_weight_of_their_new_expert() -> None:
    policy = TopKPolicyConfig(k=1, normalize="none", score="sigmoid")
    layer = make_layer(2, weight_on="input", policy=build_policy(policy, num_experts=2))
    router = router_of(layer, table_of(1, 10, 11))
    tokens = tokens_of(1)
    router.submit(tokens, torch.tensor([[4.0, 0.0]]))
    raise_error(router, router.sent_to(10), endpoint(10))
    router.engine.poll(0.0)
    assert torch.allclose(router.transport.sent[0][1].rows, 0.5 * tokens)
    assert torch.allclose(router.finish().outputs, tokens)


def test_rows_that_fail_alone_go_on_alone() -> None:
    router = router_of(make_layer(), TWINS)
    tokens = tokens_of(4)
    router.submit(tokens, logits_for(0, 0, 0, 0))
    request = router.sent_to(10)
    rows = request.rows.clone()
    rows[[1, 3]] = 0.0
    result = SegmentResult("layer/0/0", 4, error="rows are not finite", compute_ms=1.0, failed_rows=(1, 3))
    router.transport.arrivals.append(HostReply(request.ticket, (result,), rows))
    assert router.engine.poll(0.0) == []
    retry = router.transport.sent[0]
    assert retry[0] == endpoint(20)
    assert torch.equal(retry[1].rows, tokens[[1, 3]])
    done = router.finish()
    assert torch.equal(done.outputs, tokens)
    assert router.report(done).num_retried == 2


def test_rows_that_fail_alone_and_are_dropped_leak_nothing() -> None:
    router = router_of(make_layer(on_failure=order("drop"), residual="add"), TWINS)
    tokens = tokens_of(3)
    router.submit(tokens, logits_for(0, 0, 0))
    request = router.sent_to(10)
    result = SegmentResult("layer/0/0", 3, error="rows are not finite", failed_rows=(0,))
    router.transport.arrivals.append(HostReply(request.ticket, (result,), request.rows))
    done = router.finish()
    assert torch.equal(done.outputs, torch.cat([tokens[:1], 2 * tokens[1:]]))
    assert router.report(done).num_dropped_failure == 1


@pytest.mark.parametrize("failed_rows", [(4,), (0, 9)])
def test_failed_rows_that_were_never_sent_are_the_hosts_fault(failed_rows: tuple[int, ...]) -> None:
    router = router_of(make_layer(on_failure=order("drop")), TWINS)
    router.submit(tokens_of(4), logits_for(0, 0, 0, 0))
    request = router.sent_to(10)
    result = SegmentResult("layer/0/0", 4, error="odd", failed_rows=failed_rows)
    router.transport.arrivals.append(HostReply(request.ticket, (result,), request.rows))
    assert router.report(router.finish()).warnings == (
        "expert expert-0: its host answered for other rows than it was sent",
    )


def test_an_exact_layer_asks_no_twin_for_a_part_of_a_product() -> None:
    router = router_of(make_layer(on_failure=order("replica", "drop"), exact=True), TWINS)
    router.submit(tokens_of(3), logits_for(0, 0, 0))
    request = router.sent_to(10)
    result = SegmentResult("layer/0/0", 3, error="rows are not finite", failed_rows=(0,))
    router.transport.arrivals.append(HostReply(request.ticket, (result,), request.rows))
    assert router.report(router.finish()).num_dropped_failure == 1


def test_each_attempt_gets_half_of_what_remains_and_the_last_one_all() -> None:
    replicas = tuple(replica(0, 10 + n, n=n) for n in range(3))
    router = router_of(make_layer(1, on_failure=order("replica", "drop")), RoutingTable(1, {("layer", 0): replicas}))
    router.submit(tokens_of(1), torch.zeros(1, 1))
    for host, timeout_s in ((10, 1.0), (11, 1.0)):
        assert router.sent_to(host).timeout_s == timeout_s
        results = router.engine.poll(9.0)
        assert results == []
        assert router.transport.polled_for[-1] == timeout_s
        router.clock.advance(timeout_s)
        results = router.engine.poll(0.0)
    (result,) = results
    assert router.report(result).num_dropped_failure == 1
    assert router.clock.now() == 102.0
    # Whatever holds up two replicas is not sent to the third.
    assert router.hosts == []


def test_rows_that_two_experts_did_not_answer_in_time_are_not_moved_to_more() -> None:
    experts = {("layer", n): (replica(n, 10 + n),) for n in range(4)}
    router = router_of(make_layer(4, on_failure=order("reroute", "drop")), RoutingTable(1, experts))
    router.submit(tokens_of(1), torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    router.clock.advance(1.0)
    assert router.engine.poll(0.0) == []
    router.clock.advance(1.0)
    (result,) = router.engine.poll(0.0)
    assert router.hosts == [10, 11]
    assert router.report(result).num_dropped_failure == 1


def test_nothing_is_tried_after_the_layers_timeout() -> None:
    router = router_of(make_layer(on_failure=order("replica", "drop")), TWINS)
    router.submit(tokens_of(1), logits_for(0))
    router.clock.advance(2.0)
    (result,) = router.engine.poll(0.0)
    assert router.report(result).num_dropped_failure == 1
    assert router.hosts == [10]


def test_a_late_answer_is_ignored_and_counted() -> None:
    router = router_of(make_layer(), TWINS)
    tokens = tokens_of(1)
    router.submit(tokens, logits_for(0))
    late = router.sent_to(10)
    router.clock.advance(1.0)
    router.engine.poll(0.0)
    router.answer(late)
    assert router.engine.poll(0.0) == []
    assert router.engine.stats.num_late_replies == 1
    assert torch.equal(router.finish().outputs, tokens)
