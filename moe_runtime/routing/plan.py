"""The dispatch plan: which row goes to which expert. Fourth stage: capacity -> plan -> dispatch -> combine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import DispatchPlan
from moe_runtime.routing.weights import apply_weight_rule

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission


def plan_dispatch(admission: Admission) -> DispatchPlan:
    """The admitted assignments ordered by expert, then by token, with their weights.

    With ``normalize: before_drop`` a token's weights are normalised over all its assignments, those without a
    place included; with ``after_drop`` over those that have one.
    """
    assignments = admission.assignments
    assignment_ids = _by_expert_then_token(admission)
    token_ids = assignments.token_ids[assignment_ids]
    expert_ids = assignments.expert_ids[assignment_ids]
    scores = assignments.scores[assignment_ids]
    rule, num_tokens = assignments.weight_rule, assignments.num_tokens
    if rule.normalize == "before_drop":
        every_weight = apply_weight_rule(assignments.scores, assignments.token_ids, rule, num_tokens=num_tokens)
        weights = every_weight[assignment_ids]
    else:
        weights = apply_weight_rule(scores, token_ids, rule, num_tokens=num_tokens)
    bounds = torch.arange(assignments.num_experts + 1, device=expert_ids.device)
    return DispatchPlan(
        token_ids=token_ids,
        expert_ids=expert_ids,
        scores=scores,
        weights=weights,
        assignment_ids=assignment_ids,
        expert_offsets=torch.searchsorted(expert_ids, bounds),
        admission=admission,
    )


def _by_expert_then_token(admission: Admission) -> Tensor:
    assignments = admission.assignments
    keys = assignments.expert_ids * assignments.num_tokens + assignments.token_ids
    if admission.capacity is None:
        return torch.argsort(keys, stable=True)
    admitted = admission.admitted.nonzero().squeeze(1)
    return admitted[torch.argsort(keys[admitted], stable=True)]
