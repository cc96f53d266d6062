"""Assignments that go to another expert than the one they had: because it was full, or because it failed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ConfigError
from moe_runtime.routing.assignments import Selection
from moe_runtime.routing.places import count_per_expert
from moe_runtime.routing.plan import weigh_planned
from moe_runtime.routing.shared import with_shared_of, without_shared
from moe_runtime.routing.weights import largest_per_token, near_softmax, sum_per_token

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission, Assignments, DispatchPlan


def move_assignments(admission: Admission, assignment_ids: Tensor, expert_ids: Tensor) -> Admission:
    """The admission with assignments placed at other experts; each gets its token's own score there.

    Where scores are a softmax over the token's own experts, it is taken anew, as if those that it lost had been masked.

    Args:
        admission: Who has a place where.
        assignment_ids: Which assignments move, int64 ``(num_moved,)``.
        expert_ids: Where each goes, int64 ``(num_moved,)``.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    assignments = admission.assignments
    rerouted = admission.rerouted.index_fill(0, assignment_ids, True)
    all_experts = assignments.expert_ids.index_copy(0, assignment_ids, expert_ids)
    if assignments.weight_rule.softmax_over_set:
        logits = scores_of_all(assignments)[assignments.token_ids, all_experts]
        own_scores = _softmax_per_token(logits, assignments.token_ids, num_tokens=assignments.num_tokens)
        changed = _tokens_of(assignments, assignment_ids)[assignments.token_ids]
        scores = torch.where(changed, own_scores, assignments.scores)
    else:
        own_scores = _scores_at(assignments, assignments.token_ids[assignment_ids], expert_ids)
        scores = assignments.scores.index_copy(0, assignment_ids, own_scores)
    return replace(
        admission,
        assignments=replace(assignments, choices=replace(assignments.pairs, expert_ids=all_experts, scores=scores)),
        selection=Selection(
            admitted=admission.admitted | rerouted, rerouted=rerouted, asked_expert_ids=admission.asked_expert_ids
        ),
    )


def move_rows(plan: DispatchPlan, planned_ids: Tensor, expert_ids: Tensor) -> DispatchPlan:
    """The plan with rows moved to other experts, after theirs failed, and the weights that follow.

    The rows keep their places in the plan. Weights are those of ``plan_dispatch`` over the new experts; tokens without
    a moved row keep theirs, bit by bit.

    Args:
        plan: What was dispatched.
        planned_ids: Which rows move, int64 ``(num_moved,)``, each once; none of a shared expert.
        expert_ids: Where each goes, int64 ``(num_moved,)``: experts that its token does not hold.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    assignment_ids = plan.assignment_ids[planned_ids]
    admission = move_assignments(without_shared(plan.admission), assignment_ids, expert_ids)
    admission = with_shared_of(plan.admission, admission)
    assignments, ids = admission.assignments, plan.assignment_ids[plan.rows_by_token]
    changed = _tokens_of(assignments, assignment_ids)[plan.token_ids[plan.rows_by_token]]
    weights = torch.where(changed, weigh_planned(assignments, ids), plan.weights_by_token)
    moved_to = assignments.expert_ids[plan.assignment_ids]
    return replace(
        plan,
        weights_by_token=weights,
        rows_per_expert=count_per_expert(moved_to, num_experts=assignments.num_experts),
        admission=admission,
    )


def next_best_experts(assignments: Assignments, token_ids: Tensor, *, allowed: Tensor, limit: int) -> list[list[int]]:
    """The experts that each of some tokens likes best among those that it may still go to.

    Args:
        assignments: Carry the tokens' preferences among all experts.
        token_ids: Which tokens, int64 ``(num_rows,)``.
        allowed: Bool ``(num_rows, num_routed)``: where each may go.
        limit: At most so many experts per token.

    Returns:
        For each token its experts, best first; fewer than ``limit``, or none, where it may go to fewer.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    preferences = preferences_of(assignments)[token_ids].masked_fill(~allowed, -torch.inf)
    best, experts = torch.topk(preferences, min(limit, assignments.num_routed), dim=-1)
    counts = (best > -torch.inf).sum(-1).tolist()
    return [ids[:count] for ids, count in zip(experts.tolist(), counts, strict=True)]


def preferences_of(assignments: Assignments) -> Tensor:
    """What tokens prefer experts by, ``(num_tokens, num_experts)``, detached; -inf where a token may not go.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    preferences = assignments.preferences
    return (scores_of_all(assignments) if preferences is None else preferences).detach()


def scores_of_all(assignments: Assignments) -> Tensor:
    """Scores of every pair of a token and an expert, ``(num_tokens, num_routed)``.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    if assignments.all_scores is None:
        raise ConfigError(
            "capacity.overflow: expected drop, found reroute: the policy has no scores for unselected experts"
        )
    return assignments.all_scores


def _tokens_of(assignments: Assignments, assignment_ids: Tensor) -> Tensor:
    """Bool ``(num_tokens,)``: the tokens of some assignments."""
    token_ids = assignments.token_ids
    tokens = torch.zeros(assignments.num_tokens, dtype=torch.bool, device=token_ids.device)
    return tokens.index_fill(0, token_ids[assignment_ids], True)


def _scores_at(assignments: Assignments, token_ids: Tensor, expert_ids: Tensor) -> Tensor:
    """Scores of some pairs, ``(num_pairs,)``, where a score does not depend on what else the token holds."""
    all_scores, limit = scores_of_all(assignments), assignments.weight_rule.softmax_within
    if limit is None:
        return all_scores[token_ids, expert_ids]
    return near_softmax(all_scores[token_ids], expert_ids, limit=limit)


def _softmax_per_token(logits: Tensor, token_ids: Tensor, *, num_tokens: int) -> Tensor:
    largest = largest_per_token(logits, token_ids, num_tokens=num_tokens)[token_ids]
    powers = (logits - largest).exp()
    return powers / sum_per_token(powers, token_ids, num_tokens=num_tokens)[token_ids]
