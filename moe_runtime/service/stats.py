"""Counters of a router: what every layer and every expert has served and dropped since the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.routing.places import count_per_expert
from moe_runtime.service.histograms import ExpertHistograms, LayerHistograms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.batcher import JoinedBatch
    from moe_runtime.service.layer import RoutedLayer


@dataclass
class ExpertStats:
    """Counters of one expert, in assignments.

    Attributes:
        num_asked: That the policy asked it for, whatever became of them. Not counted for a shared expert.
        num_served: That it answered.
        num_dropped_capacity: That found it full.
        num_dropped_failure: That were dropped because it failed, the last expert that they were sent to.
        num_retried: That asked for it and were sent to another replica after one failed.
        num_rerouted: That asked for it and went to another expert, because it was full or failed.
        num_hedged: That asked for it and were sent to a second replica as well.
        num_timed_out: That it was sent and did not answer in time.
        num_failed_attempts: That it was sent and did not serve, those that timed out included; one assignment may fail
            at several replicas.
        num_products: Matrix products.
        compute_ms: Time that these took.
    """

    num_asked: int = 0
    num_served: int = 0
    num_dropped_capacity: int = 0
    num_dropped_failure: int = 0
    num_retried: int = 0
    num_rerouted: int = 0
    num_hedged: int = 0
    num_timed_out: int = 0
    num_failed_attempts: int = 0
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
    """Counters of one layer; ``experts`` and their histograms in the order of its gate's rows."""

    totals: LayerTotals
    experts: tuple[ExpertStats, ...]
    histograms: LayerHistograms
    expert_histograms: tuple[ExpertHistograms, ...]

    @classmethod
    def for_layer(cls, layer: RoutedLayer) -> LayerStats:
        """Counters at zero, one per expert."""
        return cls(
            LayerTotals(),
            tuple(ExpertStats() for _ in layer.experts),
            LayerHistograms(),
            tuple(ExpertHistograms() for _ in layer.experts),
        )

    def carried_to(self, layer: RoutedLayer, *, from_layer: RoutedLayer) -> LayerStats:
        """The same counters for a layer that takes the place of another: experts of one name count on.

        Batches of both layers may be counted side by side.
        """
        places = {expert.name: place for place, expert in enumerate(from_layer.experts)}
        known = [places.get(expert.name) for expert in layer.experts]
        return LayerStats(
            self.totals,
            tuple(ExpertStats() if place is None else self.experts[place] for place in known),
            self.histograms,
            tuple(ExpertHistograms() if place is None else self.expert_histograms[place] for place in known),
        )

    def count_asked(self, assignments: Assignments) -> None:
        """Add what a policy asks for, before anything is dropped or goes elsewhere."""
        # Shared experts come after those that the policy routes to.
        for expert, num_asked in zip(self.experts, assignments.load, strict=False):
            if num_asked:
                expert.num_asked += num_asked

    def count_batch(self, result: BatchResult) -> None:
        """Add a finished batch."""
        plan, admission = result.plan, result.plan.admission
        assignments = admission.assignments
        routed_rows = plan.rows_per_expert[: assignments.num_routed]
        self.totals.num_batches += 1
        self.totals.num_tokens += assignments.num_tokens
        self.histograms.count_batch(
            result.times,
            num_tokens=assignments.num_tokens,
            num_rows=sum(routed_rows),
            rows_per_expert=routed_rows,
        )
        if result.failures is None:
            for expert, num_rows in zip(self.experts, plan.rows_per_expert, strict=True):
                expert.num_served += num_rows
        else:
            # Not all of them less the failed ones: a counter that goes back looks like a restart to who reads it then.
            self._add("num_served", plan.expert_ids[result.served])
            self._add("num_dropped_failure", plan.expert_ids[~result.served])
            asked = admission.asked_expert_ids[plan.assignment_ids]
            self._add("num_retried", asked[result.mask_of(result.failures.retried)])
            self._add("num_hedged", asked[result.mask_of(result.failures.hedged)])
        if admission.selection is not None:
            self._add("num_dropped_capacity", assignments.expert_ids[~admission.admitted])
            self._add("num_rerouted", admission.asked_expert_ids[admission.rerouted])
            self.totals.num_rerouted += int(admission.rerouted.sum())

    def count_failed_attempt(self, expert_id: int, *, num_rows: int, timed_out: bool) -> None:
        """Add rows that an expert was sent and did not serve."""
        expert = self.experts[expert_id]
        expert.num_failed_attempts += num_rows
        if timed_out:
            expert.num_timed_out += num_rows

    def count_waits(self, joined: JoinedBatch) -> None:
        """Add how long the requests of a finished batch waited for it."""
        for part in joined.parts:
            self.histograms.queue_s.add(joined.joined_at - part.arrived_at)

    def count_product(self, expert_id: int, compute_ms: float, *, taken_s: float) -> None:
        """Add one matrix product of an expert, whose rows came ``taken_s`` after they were sent."""
        expert = self.experts[expert_id]
        expert.num_products += 1
        expert.compute_ms += compute_ms
        self.expert_histograms[expert_id].count_product(compute_ms / 1000.0, taken_s=taken_s)

    def _add(self, counter: str, expert_ids: Tensor) -> None:
        counts = count_per_expert(expert_ids, num_experts=len(self.experts))
        for expert, count in zip(self.experts, counts, strict=True):
            setattr(expert, counter, getattr(expert, counter) + count)


@dataclass
class RouterStats:
    """Counters of one router process; ``layers`` are those of the layers that it serves now.

    ``num_bytes_sent`` and ``num_bytes_received`` are bytes of rows to and from expert hosts, headers not included.
    """

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
    num_hedges: int = 0
    num_poisoned: int = 0
    num_bytes_sent: int = 0
    num_bytes_received: int = 0

    def snapshot(self) -> dict[str, Any]:
        """All counters as plain values, for the status page."""
        totals = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        layers = {
            name: {**vars(layer.totals), "experts": [dict(vars(expert)) for expert in layer.experts]}
            for name, layer in self.layers.items()
        }
        return {**totals, "layers": layers}
