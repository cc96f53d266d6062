"""Counters of a router: what every layer and every expert has served and dropped since the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.routing.assignments import count_per_expert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.layer import RoutedLayer


@dataclass
class ExpertStats:
    """Counters of one expert, in assignments; ``compute_ms`` sums over ``num_products`` matrix products."""

    num_served: int = 0
    num_dropped_capacity: int = 0
    num_dropped_failure: int = 0
    num_products: int = 0
    compute_ms: float = 0.0


@dataclass
class LayerTotals:
    """Counters of one layer as a whole."""

    num_batches: int = 0
    num_tokens: int = 0
    num_rerouted: int = 0


@dataclass(frozen=True)
class LayerStats:
    """Counters of one layer; ``experts`` in the order of its gate's rows."""

    totals: LayerTotals
    experts: tuple[ExpertStats, ...]

    @classmethod
    def for_layer(cls, layer: RoutedLayer) -> LayerStats:
        """Counters at zero, one per expert."""
        return cls(LayerTotals(), tuple(ExpertStats() for _ in layer.experts))

    def carried_to(self, layer: RoutedLayer, *, from_layer: RoutedLayer) -> LayerStats:
        """The same counters for a layer that takes the place of another: experts of one name count on.

        Batches of both layers may be counted side by side.
        """
        known = {expert.name: stats for expert, stats in zip(from_layer.experts, self.experts, strict=True)}
        return LayerStats(self.totals, tuple(known.get(expert.name) or ExpertStats() for expert in layer.experts))

    def count_batch(self, result: BatchResult) -> None:
        """Add a finished batch."""
        plan, admission = result.plan, result.plan.admission
        assignments = admission.assignments
        self.totals.num_batches += 1
        self.totals.num_tokens += assignments.num_tokens
        for expert, num_rows in zip(self.experts, plan.rows_per_expert, strict=True):
            expert.num_served += num_rows
        if result.failures:
            failed = count_per_expert(plan.expert_ids[~result.served], num_experts=len(self.experts))
            for expert, num_failed in zip(self.experts, failed, strict=True):
                expert.num_served -= num_failed
                expert.num_dropped_failure += num_failed
        if admission.selection is not None:
            full = count_per_expert(assignments.expert_ids[~admission.admitted], num_experts=len(self.experts))
            for expert, num_full in zip(self.experts, full, strict=True):
                expert.num_dropped_capacity += num_full
            self.totals.num_rerouted += int(admission.rerouted.sum())

    def count_product(self, expert_id: int, compute_ms: float) -> None:
        """Add one matrix product of an expert."""
        expert = self.experts[expert_id]
        expert.num_products += 1
        expert.compute_ms += compute_ms


@dataclass
class RouterStats:
    """Counters of one router process; ``layers`` are those of the layers that it serves now."""

    layers: Mapping[str, LayerStats]
    num_requests: int = 0
    num_answered: int = 0
    num_refused: int = 0
    num_cancelled: int = 0
    num_deadline_exceeded: int = 0
    num_failed: int = 0
    num_late_replies: int = 0
    num_messages: int = 0
    num_send_errors: int = 0

    def snapshot(self) -> dict[str, Any]:
        """All counters as plain values, for the status page."""
        totals = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        layers = {
            name: {**vars(layer.totals), "experts": [dict(vars(expert)) for expert in layer.experts]}
            for name, layer in self.layers.items()
        }
        return {**totals, "layers": layers}
