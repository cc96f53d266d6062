"""A batch between its dispatch and its result, and the messages that it waits for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.dispatch import HostMessage, PlannedSegment
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.routing_table import RoutingTable


@dataclass
class Flight:
    """A batch whose experts are at work."""

    batch_id: int
    batch: Batch
    layer: RoutedLayer
    plan: DispatchPlan
    table: RoutingTable
    expert_rows: Tensor
    gate_s: float
    dispatched_at: float
    deadline: float
    tickets: set[int] = field(default_factory=set)
    unserved: list[PlannedSegment] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)

    def fail(self, segments: Iterable[PlannedSegment], reason: str) -> None:
        """Give up the rows of these segments."""
        for segment in segments:
            self.unserved.append(segment)
            self.failures[segment.expert_id] = reason

    def served(self) -> Tensor:
        """Which planned rows came back, bool ``(num_planned,)``."""
        served = torch.ones(self.plan.num_planned, dtype=torch.bool)
        for segment in self.unserved:
            served[segment.start : segment.stop] = False
        return served


@dataclass(frozen=True)
class SentMessage:
    """A message that a host has not answered yet."""

    flight: Flight
    message: HostMessage
