"""Runs the fast path over one batch and holds it against the slow oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import Combined, combine, gather_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.oracles import oracle_of
from moe_runtime.routing.reference.route import forward_reference, route_reference
from moe_runtime.routing.shared import add_shared_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.routing.reference.choices import RoutedPair, RoutingInputs
    from moe_runtime.routing.reference.route import RoutingRules


@dataclass(frozen=True)
class Routed:
    """What the fast path made of a batch."""

    plan: DispatchPlan
    served: Tensor
    combined: Combined

    @property
    def outputs(self) -> Tensor:
        return self.combined.outputs

    def pairs(self) -> list[tuple[int, int, int, bool, str, float]]:
        """Token, rank, expert, rerouted, outcome, weight of each assignment, in k-major order."""
        admission = self.plan.admission
        outcomes = ["dropped_capacity"] * admission.admitted.shape[0]
        weights = [0.0] * admission.admitted.shape[0]
        for row, assignment in enumerate(self.plan.assignment_ids.tolist()):
            outcomes[assignment] = "served" if self.served[row] else "dropped_failure"
            weights[assignment] = float(self.combined.weights[row])
        assignments = admission.assignments
        columns = (assignments.token_ids, assignments.ranks, assignments.expert_ids, admission.rerouted)
        return list(zip(*(column.tolist() for column in columns), outcomes, weights, strict=True))


def token_info(inputs: RoutingInputs) -> TokenInfo:
    """What the fast path is told of the batch that the oracle is given."""

    def rows(values, dtype=torch.int64):
        return None if values is None else torch.tensor(values, dtype=dtype)

    return TokenInfo(
        k=inputs.k if isinstance(inputs.k, int) else rows(inputs.k),
        mask=rows(inputs.mask, torch.bool),
        row_seeds=rows(inputs.row_seeds),
        row_ids=rows(inputs.row_ids),
        token_ids=rows(inputs.token_ids),
        expert_bias=rows(inputs.expert_bias, torch.float64),
        training=inputs.training,
    )


def plan_of(inputs: RoutingInputs, rules: RoutingRules) -> DispatchPlan:
    """What the fast path plans for a batch."""
    policy = build_policy(rules.policy, num_experts=oracle_of(rules.policy, inputs).num_experts)
    info = token_info(inputs)
    # A policy that asks no gate gets no logits; the oracle reads the number of experts off them.
    assignments = policy.assign(inputs.router_logits[:, : policy.num_logits], info)
    admission = admit(assignments, rules.capacity, row_seeds=info.row_seeds)
    shared = None if inputs.shared_weights is None else torch.tensor(inputs.shared_weights)
    return plan_dispatch(add_shared_experts(admission, num_shared=rules.num_shared, weights=shared, mask=info.mask))


def run_layer(
    tokens: Tensor, inputs: RoutingInputs, rules: RoutingRules, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Routed:
    """One batch, from logits to outputs; rows that were not served hold NaN."""
    plan = plan_of(inputs, rules)
    rows = gather_rows(tokens, plan, weight_on=rules.weight_on)
    served = torch.tensor(
        [(t, e) not in inputs.failed for t, e in zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True)],
        dtype=torch.bool,
    )
    outputs = [experts[expert](row) for expert, row in zip(plan.expert_ids.tolist(), rows, strict=True)]
    out_shape = experts[0](tokens.new_zeros(tokens.shape[1:])).shape
    expert_outputs = torch.stack(outputs) if outputs else tokens.new_zeros((0, *out_shape))
    expert_outputs[~served] = torch.nan
    combined = combine(tokens, expert_outputs, plan, residual=rules.residual, weight_on=rules.weight_on, served=served)
    return Routed(plan=plan, served=served, combined=combined)


def _as_tuple(pair: RoutedPair) -> tuple[int, int, int, bool, str, float]:
    return pair.token, pair.rank, pair.expert, pair.rerouted, pair.outcome, pytest.approx(pair.weight, rel=1e-5)


def run_and_compare(
    tokens: Tensor, inputs: RoutingInputs, rules: RoutingRules, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Routed:
    """The fast path's result, after it was found equal to the oracle's."""
    routed = run_layer(tokens, inputs, rules, experts)
    assert routed.pairs() == [_as_tuple(pair) for pair in route_reference(inputs, rules)]
    expected = forward_reference(tokens, inputs, rules, experts=experts)
    torch.testing.assert_close(routed.outputs.double(), expected, rtol=1e-5, atol=1e-5)
    return routed


@pytest.fixture
def route() -> Callable[..., Routed]:
    """Runs a batch, compares every assignment and output with the oracle, and gives the result."""
    return run_and_compare


@pytest.fixture(scope="session")
def route_examples() -> Callable[..., Routed]:
    """The same for hypothesis, which wants no function-scoped fixtures."""
    return run_and_compare


@pytest.fixture(scope="session")
def plan_examples() -> Callable[..., DispatchPlan]:
    """What the fast path plans for a batch, from what the oracle is given."""
    return plan_of
