"""What a scrape says of counters that were set by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fakes.service import make_layer, replica
from moe_runtime.metrics.collector import RouterCollector
from moe_runtime.service.layer import ExpertInfo, RoutedLayer
from moe_runtime.service.lineup import Lineup
from moe_runtime.service.online_bias import LayerBias
from moe_runtime.service.routing_table import ReplicaState, RoutingTable
from moe_runtime.service.stats import RouterStats

INFO = {"version": "1", "runtime": "r", "node": 'n"1\n\\', "address": "h:1"}


class Router:
    """Counters without a router."""

    def __init__(self, *layers: RoutedLayer) -> None:
        self.lineup = Lineup.of({layer.name: layer for layer in layers})
        self.stats = RouterStats(self.lineup.stats)

    def status(self) -> dict[str, Any]:
        layers = {
            name: {"queued_tokens": 7, "queued_requests": 2, "batches_in_flight": 1} for name in self.lineup.layers
        }
        return {
            "layers": layers,
            "queue": {
                "bytes": 99,
                "refused": {"bytes": 6, "draining": 0},
                "num_expired_before_compute": 8,
                "num_cancelled_before_compute": 9,
            },
            "open_requests": 3,
            "draining": True,
            "uptime_s": 1.5,
            "table_version": 4,
            "transport": {"num_sent": 5, "num_lost": 1},
        }

    def replace(self, *layers: RoutedLayer) -> None:
        self.lineup = self.lineup.replaced_by({layer.name: layer for layer in layers})


def scrape(collector: RouterCollector) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry).decode()


def collector_of(router: Router, *, hottest_experts: int = 20) -> RouterCollector:
    return RouterCollector(router, info=INFO, hottest_experts=hottest_experts)


@pytest.mark.parametrize(
    "line",
    [
        'moe_queue_tokens{layer="layer"} 7.0',
        'moe_queue_requests{layer="layer"} 2.0',
        'moe_batches_in_flight{layer="layer"} 1.0',
        "moe_queue_bytes 99.0",
        "moe_open_requests 3.0",
        'moe_requests_refused_total{reason="bytes"} 6.0',
        'moe_requests_uncomputed_total{cause="expired"} 8.0',
        'moe_requests_uncomputed_total{cause="cancelled"} 9.0',
        "moe_draining 1.0",
        "moe_uptime_seconds 1.5",
        "moe_table_version 4.0",
        'moe_transport_events_total{event="sent"} 5.0',
        'moe_transport_events_total{event="lost"} 1.0',
    ],
)
def test_load_is_what_the_status_says(line: str) -> None:
    assert line in scrape(collector_of(Router(make_layer()))).splitlines()


def test_values_of_labels_are_escaped() -> None:
    assert r'node="n\"1\n\\"' in scrape(collector_of(Router(make_layer())))


def test_ways_in_which_requests_end_are_told_apart() -> None:
    router = Router(make_layer())
    stats = router.stats
    # Cancelled ones and those out of time count among the failed.
    stats.num_answered, stats.num_failed, stats.num_cancelled, stats.num_deadline_exceeded = 10, 9, 2, 3
    text = scrape(collector_of(router))
    for outcome, count in (("answered", 10), ("failed", 4), ("cancelled", 2), ("deadline_exceeded", 3)):
        assert f'moe_requests_total{{outcome="{outcome}"}} {count}.0' in text


def test_replicas_are_counted_by_state_and_experts_without_one_are_out() -> None:
    router = Router(make_layer(3))
    restarted = replace(replica(0, 1, state=ReplicaState.SUSPECT), num_restarts=2)
    router.lineup.table = RoutingTable(
        1, {("layer", 0): (restarted, replica(0, 2, n=1)), ("layer", 1): (replica(1, 3, state=ReplicaState.OUT),)}
    )
    text = scrape(collector_of(router))
    for state, count in (("starting", 0), ("ready", 1), ("suspect", 1), ("out", 1)):
        assert f'moe_replicas{{layer="layer",state="{state}"}} {count}.0' in text
    assert 'moe_experts_out{layer="layer"} 2.0' in text
    assert 'moe_replica_restarts_total{layer="layer"} 2.0' in text


def test_each_counter_of_an_expert_has_its_series() -> None:
    router = Router(make_layer())
    expert = router.lineup.stats["layer"].experts[1]
    expert.num_served, expert.num_dropped_capacity, expert.num_dropped_failure = 1, 2, 3
    expert.num_retried, expert.num_rerouted, expert.num_hedged = 4, 5, 6
    expert.num_timed_out, expert.num_failed_attempts = 7, 8
    router.lineup.stats["layer"].count_product(1, 2.0, taken_s=0.003)
    text = scrape(collector_of(router))
    for outcome, count in (("served", 1), ("dropped_capacity", 2), ("dropped_failure", 3)):
        labels = f'expert="expert-1",layer="layer",outcome="{outcome}"'
        assert f"moe_expert_assignments_total{{{labels}}} {count}.0" in text
        assert f'moe_assignments_total{{layer="layer",outcome="{outcome}"}} {count}.0' in text
    for step, count in (("retried", 4), ("rerouted", 5), ("hedged", 6), ("timed_out", 7), ("failed_attempt", 8)):
        labels = f'expert="expert-1",layer="layer",step="{step}"'
        assert f"moe_expert_steps_total{{{labels}}} {count}.0" in text
    assert 'moe_expert_compute_seconds_sum{expert="expert-1",layer="layer"} 0.002' in text
    assert 'moe_expert_wait_seconds_sum{expert="expert-1",layer="layer"} 0.001' in text
    assert 'moe_expert_wait_seconds_count{expert="expert-0",layer="layer"} 0.0' in text


def test_shared_experts_are_counted_apart_from_what_the_policy_asked_for() -> None:
    router = Router(make_layer(3, num_shared=1), make_layer(2, name="plain"))
    for served, expert in enumerate(router.lineup.stats["layer"].experts, start=1):
        expert.num_served, expert.num_dropped_failure = served, 10 * served
    text = scrape(collector_of(router))
    for outcome, routed, shared in (("served", 3, 3), ("dropped_failure", 30, 30)):
        assert f'moe_assignments_total{{layer="layer",outcome="{outcome}"}} {routed}.0' in text
        assert f'moe_shared_assignments_total{{layer="layer",outcome="{outcome}"}} {shared}.0' in text
    assert 'moe_shared_assignments_total{layer="plain"' not in text


def test_a_bias_that_moves_is_told_and_one_that_does_not_is_not() -> None:
    router = Router(make_layer(), make_layer(name="still"))
    bias = LayerBias(("expert-0", "expert-1"), (0.25, -0.25), num_steps=3, load_ratio=1.5)
    router.lineup.table = RoutingTable(1, {}, {"layer": bias})
    text = scrape(collector_of(router))
    assert 'moe_expert_bias{expert="expert-0",layer="layer"} 0.25' in text
    assert 'moe_expert_bias{expert="expert-1",layer="layer"} -0.25' in text
    assert 'moe_bias_steps_total{layer="layer"} 3.0' in text
    assert 'moe_bias_largest{layer="layer"} 0.25' in text
    assert 'moe_bias_load_ratio{layer="layer"} 1.5' in text
    assert "bias" not in "".join(line for line in text.splitlines() if 'layer="still"' in line)


def test_before_the_first_step_a_bias_has_no_load() -> None:
    router = Router(make_layer())
    router.lineup.table = RoutingTable(1, {}, {"layer": LayerBias.at_zero(("expert-0", "expert-1"))})
    text = scrape(collector_of(router))
    assert 'moe_bias_steps_total{layer="layer"} 0.0' in text
    assert "moe_bias_load_ratio{" not in text


def test_only_the_hottest_experts_have_a_series_of_their_bias() -> None:
    router = Router(make_layer(8))
    router.lineup.stats["layer"].experts[6].num_served = 100
    names = tuple(f"expert-{i}" for i in range(8))
    router.lineup.table = RoutingTable(1, {}, {"layer": LayerBias(names, tuple(map(float, range(8))))})
    text = scrape(collector_of(router, hottest_experts=2))
    told = [line for line in text.splitlines() if line.startswith("moe_expert_bias{")]
    assert len(told) == 2
    assert 'moe_expert_bias{expert="expert-6",layer="layer"} 6.0' in told


def test_the_number_of_series_does_not_grow_with_the_experts() -> None:
    few, many = (
        len(scrape(collector_of(Router(make_layer(n)), hottest_experts=4)).splitlines()) for n in (8, 256)
    )  # fmt: skip
    assert few == many


def test_a_replaced_layer_counts_on_and_one_that_is_gone_is_not_told() -> None:
    router = Router(make_layer(2), make_layer(2, name="gone"))
    collector = collector_of(router)
    router.lineup.stats["layer"].experts[0].num_served = 5
    assert 'layer="gone"' in scrape(collector)
    experts = (ExpertInfo(0, "expert-new", "identity"), ExpertInfo(1, "expert-0", "identity"))
    router.replace(make_layer(2, experts=experts))
    text = scrape(collector)
    assert 'layer="gone"' not in text
    assert 'expert="expert-0",layer="layer",outcome="served"} 5.0' in text
    assert 'expert="expert-new",layer="layer",outcome="served"} 0.0' in text
