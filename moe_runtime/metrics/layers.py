"""The families that have a series per layer, stage or expert."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.metrics import catalogue
from moe_runtime.metrics.hottest import HottestExperts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from prometheus_client.core import HistogramMetricFamily
    from prometheus_client.core import Metric as Family

    from moe_runtime.service.histograms import Histogram
    from moe_runtime.service.lineup import Lineup
    from moe_runtime.service.stats import ExpertStats, LayerStats

#: How assignments of an expert end, and what else happens to them; another counter is a line here.
_OUTCOMES: Mapping[str, Callable[[ExpertStats], int]] = {
    "served": lambda expert: expert.num_served,
    "dropped_capacity": lambda expert: expert.num_dropped_capacity,
    "dropped_failure": lambda expert: expert.num_dropped_failure,
}
#: Shared experts are never full.
_SHARED_OUTCOMES = ("served", "dropped_failure")
_STEPS: Mapping[str, Callable[[ExpertStats], int]] = {
    "retried": lambda expert: expert.num_retried,
    "rerouted": lambda expert: expert.num_rerouted,
    "hedged": lambda expert: expert.num_hedged,
    "timed_out": lambda expert: expert.num_timed_out,
    "failed_attempt": lambda expert: expert.num_failed_attempts,
}


class LayerCollector:
    """Counters and histograms of layers and experts; remembers which experts have names.

    Args:
        hottest_experts: Experts per layer that have series of their own.
    """

    def __init__(self, hottest_experts: int) -> None:
        self._most = hottest_experts
        self._hottest: dict[str, HottestExperts] = {}

    def collect(self, lineup: Lineup) -> Iterator[Family]:
        """The families of all layers."""
        yield from _counters(lineup)
        yield from _histograms(lineup)
        yield from self._experts(lineup)
        # After the experts: those that have series of their own are known then.
        yield from self._biases(lineup)

    def _experts(self, lineup: Lineup) -> Iterator[Family]:
        assignments, steps = catalogue.EXPERT_ASSIGNMENTS.counter(), catalogue.EXPERT_STEPS.counter()
        compute, wait = catalogue.EXPERT_COMPUTE.histogram(), catalogue.EXPERT_WAIT.histogram()
        self._hottest = {layer: hottest for layer, hottest in self._hottest.items() if layer in lineup.stats}
        for layer, stats in lineup.stats.items():
            totals = np.array(
                [_row(counters, own.compute_s, own.wait_s) for counters, own in
                 zip(stats.experts, stats.expert_histograms, strict=True)]
            )  # fmt: skip
            names = [expert.name for expert in lineup.layers[layer].experts]
            bounds = stats.expert_histograms[0].compute_s.bounds
            width = len(bounds) + 2
            for label, values in self._split(layer, names, totals):
                outcomes, steps_taken = values[: len(_OUTCOMES)], values[len(_OUTCOMES) : -2 * width]
                for outcome, count in zip(_OUTCOMES, outcomes.tolist(), strict=True):
                    assignments.add_metric([layer, label, outcome], count)
                for step, count in zip(_STEPS, steps_taken.tolist(), strict=True):
                    steps.add_metric([layer, label, step], count)
                _add(compute, [layer, label], bounds, values[-2 * width : -width].tolist())
                _add(wait, [layer, label], bounds, values[-width:].tolist())
        yield from (assignments, steps, compute, wait)

    def _biases(self, lineup: Lineup) -> Iterator[Family]:
        biases, steps = catalogue.EXPERT_BIAS.gauge(), catalogue.BIAS_STEPS.counter()
        largest, ratio = catalogue.BIAS_LARGEST.gauge(), catalogue.BIAS_LOAD.gauge()
        for layer, bias in lineup.table.biases.items():
            hottest = self._hottest.get(layer)
            if hottest is None:
                continue
            # Shared experts come after those that have a bias.
            for place in (place for place in hottest.named if place < len(bias.values)):
                biases.add_metric([layer, hottest.names[place]], bias.values[place])
            steps.add_metric([layer], bias.num_steps)
            largest.add_metric([layer], bias.largest)
            if bias.load_ratio is not None:
                ratio.add_metric([layer], bias.load_ratio)
        yield from (biases, steps, largest, ratio)

    def _split(
        self, layer: str, names: Sequence[str], totals: NDArray[np.float64]
    ) -> Iterator[tuple[str, NDArray[np.float64]]]:
        hottest = self._hottest.get(layer)
        if hottest is None or hottest.names != tuple(names):
            # Other experts in this layer: their series begin again.
            hottest = self._hottest[layer] = HottestExperts(names, most=self._most)
        yield from hottest.split(totals, totals[:, 0])


def _row(counters: ExpertStats, *histograms: Histogram) -> list[float]:
    row: list[float] = [count(counters) for count in (*_OUTCOMES.values(), *_STEPS.values())]
    for histogram in histograms:
        row += (*histogram.counts, histogram.sum)
    return row


def _counters(lineup: Lineup) -> Iterator[Family]:
    batches, tokens = catalogue.BATCHES.counter(), catalogue.TOKENS.counter()
    assignments, rerouted = catalogue.ASSIGNMENTS.counter(), catalogue.ASSIGNMENTS_REROUTED.counter()
    shared = catalogue.SHARED_ASSIGNMENTS.counter()
    for layer, stats in lineup.stats.items():
        batches.add_metric([layer], stats.totals.num_batches)
        tokens.add_metric([layer], stats.totals.num_tokens)
        rerouted.add_metric([layer], stats.totals.num_rerouted)
        num_routed = lineup.layers[layer].num_routed
        for outcome, count in _OUTCOMES.items():
            assignments.add_metric([layer, outcome], sum(map(count, stats.experts[:num_routed])))
        for outcome in _SHARED_OUTCOMES if num_routed < len(stats.experts) else ():
            shared.add_metric([layer, outcome], sum(map(_OUTCOMES[outcome], stats.experts[num_routed:])))
    yield from (batches, tokens, assignments, rerouted, shared)


def _histograms(lineup: Lineup) -> Iterator[Family]:
    batch_tokens, load = catalogue.BATCH_TOKENS.histogram(), catalogue.BATCH_LOAD.histogram()
    stages = catalogue.STAGE_SECONDS.histogram()
    for layer, stats in lineup.stats.items():
        _add_histogram(batch_tokens, [layer], stats.histograms.batch_tokens)
        _add_histogram(load, [layer], stats.histograms.load_ratio)
        for stage, histogram in _stages(stats):
            _add_histogram(stages, [layer, stage], histogram)
    yield from (batch_tokens, load, stages)


def _stages(stats: LayerStats) -> tuple[tuple[str, Histogram], ...]:
    own = stats.histograms
    return (("queue", own.queue_s), ("gate", own.gate_s), ("experts", own.experts_s), ("combine", own.combine_s))


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    _add(family, labels, histogram.bounds, [*histogram.counts, histogram.sum])


def _add(
    family: HistogramMetricFamily, labels: Sequence[str], bounds: Sequence[float], values: Sequence[float]
) -> None:
    """Add a series from counts per bound, not cumulated, and the sum."""
    *counts, total = values
    limits = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
    family.add_metric(labels, buckets=list(zip(limits, accumulate(counts), strict=True)), sum_value=total)
