from __future__ import annotations

import time

import pytest

from fakes.service import make_layer
from moe_runtime.service.batch import StageTimes
from moe_runtime.service.histograms import (
    RATIO_BOUNDS,
    SECONDS_BOUNDS,
    TOKENS_BOUNDS,
    ExpertHistograms,
    Histogram,
    LayerHistograms,
)
from moe_runtime.service.stats import LayerStats

#: Far above what it takes, and far below what a batch takes: the machine may be busy.
MOST_S_PER_BATCH = 50e-6


def test_a_value_counts_under_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == 7.5
    assert histogram.num_values == 5


@pytest.mark.parametrize("bounds", [SECONDS_BOUNDS, TOKENS_BOUNDS, RATIO_BOUNDS])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_a_batch_is_counted_with_its_stages_and_its_balance() -> None:
    histograms = LayerHistograms()
    times = StageTimes(gate_s=0.001, experts_s=0.02, combine_s=0.0002)
    histograms.count_batch(times, num_tokens=6, num_rows=12, rows_per_expert=(6, 2, 4, 0))
    assert histograms.batch_tokens.sum == 6
    assert histograms.load_ratio.sum == 2.0
    assert [h.sum for h in (histograms.gate_s, histograms.experts_s, histograms.combine_s)] == [0.001, 0.02, 0.0002]


def test_a_batch_without_rows_has_no_balance() -> None:
    histograms = LayerHistograms()
    histograms.count_batch(StageTimes(0.0, 0.0, 0.0), num_tokens=2, num_rows=0, rows_per_expert=(0, 0))
    assert histograms.load_ratio.num_values == 0
    assert histograms.batch_tokens.num_values == 1


def test_what_a_product_did_not_take_is_waiting_and_never_negative() -> None:
    histograms = ExpertHistograms()
    histograms.count_product(0.25, taken_s=1.0)
    # Two clocks: the host's product may look longer than the time in which it was answered.
    histograms.count_product(0.25, taken_s=0.2)
    assert histograms.compute_s.sum == 0.5
    assert histograms.wait_s.sum == 0.75


def test_histograms_go_over_to_the_layer_that_takes_the_place() -> None:
    before = make_layer(2)
    stats = LayerStats.for_layer(before)
    stats.count_product(1, 250.0, taken_s=1.0)
    after = stats.carried_to(make_layer(3), from_layer=before)
    assert after.histograms is stats.histograms
    assert after.expert_histograms[1] is stats.expert_histograms[1]
    assert after.experts[1].num_products == 1
    assert after.expert_histograms[2].compute_s.num_values == 0


def test_counting_a_batch_takes_next_to_nothing() -> None:
    histograms, times, rows = LayerHistograms(), StageTimes(0.001, 0.002, 0.0003), (128,) * 8
    rounds = []
    for _ in range(5):
        started_at = time.perf_counter()
        for _ in range(1000):
            histograms.count_batch(times, num_tokens=512, num_rows=1024, rows_per_expert=rows)
            histograms.queue_s.add(0.001)
        rounds.append((time.perf_counter() - started_at) / 1000)
    assert min(rounds) < MOST_S_PER_BATCH
