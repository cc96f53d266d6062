"""A layer as the router sees it: its shapes, its gate and its rules; the experts themselves are elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from moe_runtime.config.models import OnFailureConfig
from moe_runtime.routing.shared import add_shared_experts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_runtime.config.models import CapacityConfig, HedgeConfig, ResidualRule, WeightOn
    from moe_runtime.routing.assignments import Admission
    from moe_runtime.routing.gate import Gate
    from moe_runtime.routing.policy import Policy
    from moe_runtime.service.requests import LayerRequest


@dataclass(frozen=True)
class ExpertInfo:
    """An expert's place in its layer: ``expert_id`` is its row of the gate, if it is not a shared one."""

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
        gate: ``(T, gate_features) -> (T, num_logits of the policy)`` router logits, in evaluation mode.
        gate_features: Width of the gate's input.
        policy: Turns router logits into assignments.
        policy_kind: The policy's name in the configuration.
        capacity: Capacity, drop order and overflow.
        residual: What a token without a served assignment becomes.
        weight_on: Whether weights scale the experts' inputs or outputs.
        timeout_s: Bounds a batch, from its dispatch.
        allow_non_finite: Whether the input may hold NaN and infinities.
        max_batches_in_flight: Batches of this layer under way at once.
        experts: In the order of the gate's rows; the shared ones after them.
        exact: Whether outputs are bit-identical to one process.
        wire_dtype: Of rows on their way to experts and back; the layer's dtype when None.
        on_failure: What becomes of an assignment whose expert fails.
        hedge: When a second replica is asked as well; never when None.
        allow_batch_coupled: Whether requests share a batch although the policy couples its tokens.
        num_shared: How many of the experts, the last ones, serve every token.
        level: 0 where no other layer asks this one; else one more than the innermost of those whose expert it is.
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
    exact: bool = False
    wire_dtype: torch.dtype | None = None
    on_failure: OnFailureConfig = field(default_factory=OnFailureConfig)
    hedge: HedgeConfig | None = None
    allow_batch_coupled: bool = False
    num_shared: int = 0
    level: int = 0

    @property
    def num_experts(self) -> int:
        """Number of experts, out or not."""
        return len(self.experts)

    @property
    def num_routed(self) -> int:
        """Experts that the policy routes to."""
        return len(self.experts) - self.num_shared

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of rows on their way to experts and back."""
        return self.wire_dtype or self.dtype

    @cached_property
    def can_reroute(self) -> bool:
        """Whether an assignment whose expert fails may go to another one.

        Not where the rows that its token has sent already were multiplied by weights that this would change.
        """
        if "reroute" not in self.on_failure.order or not self.policy.can_reroute:
            return False
        rule = self.policy.weight_rule
        weights_depend = (rule.normalize != "none" or rule.softmax_over_set) and self.policy.max_k > 1
        return self.weight_on == "output" or not weights_depend

    @property
    def is_batch_coupled(self) -> bool:
        """Whether rows that share a batch change each other's answers, and the layer does not allow it of requests."""
        return self.policy.batch_coupled and not self.allow_batch_coupled

    @property
    def isolates_requests(self) -> bool:
        """Whether a request must be a batch of its own."""
        return self.exact or self.is_batch_coupled

    @property
    def splits_requests(self) -> bool:
        """Whether rows of one request may be in several batches."""
        return not self.exact and not self.policy.batch_coupled

    @property
    def asks_gate(self) -> bool:
        """Whether the gate's input decides anything."""
        return self.policy.num_logits > 0 or self.gate.shared_weight is not None

    @property
    def draws_at_random(self) -> bool:
        """Whether anything is decided by the seeds of requests."""
        drops_at_random = self.capacity.factor is not None and self.capacity.drop == "random"
        return drops_at_random or self.policy.draws_in_evaluation

    @property
    def item_size(self) -> int:
        """Elements of one token."""
        return math.prod(self.item_shape)

    def task_of(self, request: LayerRequest) -> str | None:
        """The task that a request is of, for a gate with a part per task."""
        return self.gate.default_task if request.options.task is None else request.options.task

    def add_shared(self, admission: Admission, gate_input: Tensor, *, mask: Tensor | None) -> Admission:
        """The admission with all valid tokens at the shared experts too; see ``add_shared_experts``."""
        if self.num_shared == 0:
            return admission
        weights = None if self.gate.shared_weight is None else self.gate.shared_weights(gate_input)
        return add_shared_experts(admission, num_shared=self.num_shared, weights=weights, mask=mask)
