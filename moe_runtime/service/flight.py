"""A batch between its dispatch and its result, and the messages that it waits for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.dispatch import HostMessage, PlannedSegment
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.routing_table import RoutingTable
    from moe_runtime.service.row_buffers import ExpertRows
    from moe_runtime.service.stats import LayerStats


@dataclass(slots=True)
class Flight:
    """A batch whose experts are at work."""

    batch_id: int
    batch: Batch
    layer: RoutedLayer
    plan: DispatchPlan
    table: RoutingTable
    stats: LayerStats
    expert_rows: ExpertRows
    gate_s: float
    dispatched_at: float
    deadline: float
    num_unanswered: int = 0
    unserved: list[PlannedSegment] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)

    def fail(self, segments: Iterable[PlannedSegment], reason: str) -> None:
        """Give up the rows of these segments."""
        for segment in segments:
            self.unserved.append(segment)
            self.failures[segment.expert_id] = reason

    def served(self) -> Tensor | None:
        """Which planned rows came back, bool ``(num_planned,)``; None is all."""
        if not self.unserved:
            return None
        served = torch.ones(self.plan.num_planned, dtype=torch.bool)
        for segment in self.unserved:
            served[segment.start : segment.stop] = False
        return served


class SentMessage(NamedTuple):
    """A message that a host has not answered yet."""

    flight: Flight
    message: HostMessage
