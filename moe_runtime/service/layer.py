"""A layer as the router sees it: its shapes, its gate and its rules; the experts themselves are elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from moe_runtime.config.models import CapacityConfig, ResidualRule, WeightOn
    from moe_runtime.routing.gates import Gate
    from moe_runtime.routing.policies import Policy


@dataclass(frozen=True)
class ExpertInfo:
    """An expert's place in its layer: ``expert_id`` is its row of the gate."""

    expert_id: int
    name: str
    kind: str


@dataclass(frozen=True)
class RoutedLayer:
    """Everything that the router needs to know of one layer.

    Attributes:
        name: The layer's.
        item_shape: Shape of one token.
        out_shape: Shape of one output row.
        dtype: Of tokens, expert rows and outputs.
        gate: ``(T, gate_features) -> (T, num_experts)`` router logits, in evaluation mode.
        gate_features: Width of the gate's input.
        policy: Turns router logits into assignments.
        policy_kind: The policy's name in the configuration.
        capacity: Capacity, drop order and overflow.
        residual: What a token without a served assignment becomes.
        weight_on: Whether weights scale the experts' inputs or outputs.
        timeout_s: Bounds a batch, from its dispatch.
        allow_non_finite: Whether the input may hold NaN and infinities.
        max_batches_in_flight: Batches of this layer under way at once.
        experts: In the order of the gate's rows.
    """

    name: str
    item_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    gate: Gate
    gate_features: int
    policy: Policy
    policy_kind: str
    capacity: CapacityConfig
    residual: ResidualRule
    weight_on: WeightOn
    timeout_s: float
    allow_non_finite: bool
    max_batches_in_flight: int
    experts: tuple[ExpertInfo, ...]

    @property
    def num_experts(self) -> int:
        """Number of experts, out or not."""
        return len(self.experts)

    @property
    def item_size(self) -> int:
        """Elements of one token."""
        return math.prod(self.item_shape)
