"""A policy with gate and capacity, ready to route: what suite `routers` times, and whose loads it counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.router_batches import batches, make_batch
from moe_runtime.config.models import CapacityConfig
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.expert_bias import update_bias
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import LinearGate
from moe_runtime.routing.metrics import drop_rate, max_over_mean
from moe_runtime.routing.plan import plan_dispatch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.bench.router_cases import RouterCase
    from moe_runtime.bench.shapes import Shape
    from moe_runtime.routing.assignments import Admission, DispatchPlan
    from moe_runtime.routing.policy import Policy, TokenInfo

FEATURES = 1024
CAPACITY_FACTOR = 1.25
#: The controller's steps, larger than in training so that few are enough, and the tokens that each sees.
_BIAS_STEPS, _BIAS_RATE, _BIAS_TOKENS = 150, 2e-2, 512


@dataclass(frozen=True)
class Router:
    """A case, ready to route the batches of one shape.

    Attributes:
        case: What is routed.
        policy: Its policy.
        gate: A linear gate of the width that the policy asks for.
        bias: Selection bias, tuned to the shape, float32 ``(num_experts,)``; None where the policy has none.
    """

    case: RouterCase
    policy: Policy
    gate: LinearGate
    bias: Tensor | None

    def admit(self, logits: Tensor, info: TokenInfo) -> Admission:
        """Policy and capacity; the logits are the policy's own, ``(num_tokens, num_logits)``."""
        factor = None if self.policy.sets_capacity else CAPACITY_FACTOR
        known = replace(info, expert_bias=self.bias, training=self.case.training)
        assignments = self.policy.assign(logits, known)
        return admit(assignments, CapacityConfig(factor=factor), row_seeds=info.row_seeds)

    def plan(self, logits: Tensor, info: TokenInfo) -> DispatchPlan:
        """Policy, capacity and plan."""
        return plan_dispatch(self.admit(logits, info))

    def route(self, tokens: Tensor, info: TokenInfo) -> DispatchPlan:
        """Gate, policy, capacity and plan."""
        return self.plan(self.gate(tokens), info)


def build_router(case: RouterCase, shape: Shape, *, num_experts: int) -> Router:
    """The case's router for a number of experts."""
    policy = case.policy(num_experts)
    init = torch.Generator().manual_seed(num_experts)
    gate = LinearGate(GateShape(FEATURES, policy.num_logits), init=init, bias=False).eval()
    return Router(case, policy, gate, _tuned_bias(policy, shape) if policy.uses_bias else None)


def _tuned_bias(policy: Policy, shape: Shape) -> Tensor:
    """What the controller of the selection bias has come to after many batches of a shape."""
    bias = torch.zeros(policy.num_experts)
    for step in range(_BIAS_STEPS):
        batch = make_batch(shape, step % 10 + 1, num_tokens=_BIAS_TOKENS, num_experts=policy.num_experts)
        load = policy.assign(batch.logits, replace(batch.info, expert_bias=bias)).load
        bias = update_bias(bias, torch.tensor(load), rate=_BIAS_RATE)
    return bias


def spread(router: Router, shape: Shape) -> dict[str, float]:
    """How a router spreads the batches of a shape over its experts.

    Returns:
        ``max_over_mean``: load of the busiest expert, as asked for, over that of the mean one, the mean of the
        batches; ``dropped``: share of the assignments that found no place; ``unserved``: share of the tokens that
        have no expert in the end.
    """
    admissions = [
        router.admit(router.case.logits(batch.logits), batch.info)
        for batch in batches(shape, num_experts=router.policy.num_experts)
    ]
    return {
        "max_over_mean": fmean(max_over_mean(each.assignments.load) for each in admissions),
        "dropped": drop_rate(
            num_dropped=sum(int((~each.admitted).sum()) for each in admissions),
            num_requested=sum(each.assignments.num_assignments for each in admissions),
        ),
        "unserved": 1.0 - sum(map(_num_served, admissions)) / sum(each.assignments.num_tokens for each in admissions),
    }


def _num_served(admission: Admission) -> int:
    return int(torch.unique(admission.assignments.token_ids[admission.admitted]).numel())
