"""How scores become weights, and sums per token: shared by planning, combining and the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments, Pairs, WeightRule


def sum_per_token(values: Tensor, token_ids: Tensor, *, num_tokens: int) -> Tensor:
    """Sum of the values of each token, ``(num_tokens,)``; 0 for a token without any."""
    return values.new_zeros(num_tokens).index_add(0, token_ids, values)


def largest_per_token(values: Tensor, token_ids: Tensor, *, num_tokens: int) -> Tensor:
    """Largest value of each token, ``(num_tokens,)``, detached; minus infinity for a token without any."""
    lowest = values.new_full((num_tokens,), -torch.inf)
    return lowest.scatter_reduce(0, token_ids, values.detach(), reduce="amax")


def apply_weight_rule(scores: Tensor, token_ids: Tensor, rule: WeightRule, *, num_tokens: int) -> Tensor:
    """Weights of (token, expert) pairs, normalised over exactly the pairs that are given.

    Never NaN for finite scores: a token whose scores are all 0 gets weights of 0.

    Args:
        scores: Non-negative scores, ``(num_pairs,)``.
        token_ids: Row of each pair, int64 ``(num_pairs,)``.
        rule: The norm and the scaling factor; ``normalize: none`` leaves the scores as they are.
        num_tokens: Rows of the batch.

    Returns:
        ``(num_pairs,)`` in the dtype of ``scores``.
    """
    if rule.normalize != "none":
        scores = scores / _norms(scores, token_ids, rule.norm_p, num_tokens=num_tokens)[token_ids]
    return scores if rule.scaling_factor == 1.0 else scores * rule.scaling_factor


def weigh_assignments(assignments: Assignments, ids: Tensor | None = None, *, beside: Pairs | None = None) -> Tensor:
    """Weights of assignments, normalised over exactly those that are given; a shared expert's score is its weight.

    Args:
        assignments: What was asked for.
        ids: Which of them, int64 ``(num_pairs,)``; all when None.
        beside: What else the norm counts.

    Returns:
        ``(num_pairs,)`` in the dtype of the scores.
    """
    scores, token_ids = assignments.scores, assignments.token_ids
    if ids is not None:
        scores, token_ids = scores[ids], token_ids[ids]
    is_shared = _is_shared(assignments, ids)
    counted = scores if is_shared is None else scores.masked_fill(is_shared, 0.0)
    if beside is not None:
        counted, token_ids = torch.cat([counted, beside.scores]), torch.cat([token_ids, beside.token_ids])
    weights = apply_weight_rule(counted, token_ids, assignments.weight_rule, num_tokens=assignments.num_tokens)
    weights = weights[: scores.shape[0]]
    return weights if is_shared is None else torch.where(is_shared, scores, weights)


def weigh_grid(scores: Tensor, rule: WeightRule, *, num_shared: int = 0) -> Tensor:
    """Weights of a grid of choices, each row normalised over itself; see ``apply_weight_rule``.

    Args:
        scores: Non-negative scores, ``(num_tokens, k + num_shared)``.
        rule: The norm and the scaling factor.
        num_shared: The last so many columns are weights already, and outside of the norm.

    Returns:
        As wide as ``scores``, in their dtype.
    """
    if num_shared:
        return torch.cat([weigh_grid(scores[:, :-num_shared], rule), scores[:, -num_shared:]], dim=1)
    if rule.normalize != "none" and rule.norm_p == 1.0:
        scores = scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    elif rule.normalize != "none":
        largest = scores.detach().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        sums = ((scores / largest) ** rule.norm_p).sum(dim=-1, keepdim=True)
        scores = scores / (largest * sums.clamp_min(1.0) ** (1.0 / rule.norm_p))
    return scores if rule.scaling_factor == 1.0 else scores * rule.scaling_factor


def requested_weights(assignments: Assignments) -> Tensor:
    """Weights of all assignments as if every one of them were served, ``(num_assignments,)``."""
    others = None
    if assignments.left_out is not None and assignments.weight_rule.normalize == "before_drop":
        others = _not_held(assignments, assignments.left_out)
    return weigh_assignments(assignments, beside=others)


def near_softmax(logits: Tensor, expert_ids: Tensor, *, limit: float) -> Tensor:
    """Probability of one expert per row, among those that are no better than it and near it.

    Near is ``(own - logit) / max(abs(logit), own) <= limit``. It is what sparsemixer weighs an expert by when its
    better ones are masked (Phi-3.5-MoE, https://arxiv.org/abs/2409.12136); of equal ones the first is the better.

    Args:
        logits: Finite, ``(num_rows, num_experts)``.
        expert_ids: int64 ``(num_rows,)``.
        limit: What counts as near, relative to the size of the logits.

    Returns:
        ``(num_rows,)`` in the dtype of ``logits``.
    """
    column = expert_ids[:, None]
    with torch.no_grad():
        own = logits.gather(1, column)
        earlier = torch.arange(logits.shape[1], device=logits.device) < column
        # 0 / 0, a logit of 0 beside a best of 0, is not above any limit.
        far = (own - logits) / torch.maximum(logits.abs(), own) > limit
        others = far | (logits > own) | ((logits == own) & earlier)
    return torch.softmax(logits.masked_fill(others, -torch.inf), dim=-1).gather(1, column).squeeze(1)


def _is_shared(assignments: Assignments, ids: Tensor | None) -> Tensor | None:
    """Which assignments are of shared experts; None where there are no such experts."""
    if not assignments.num_shared:
        return None
    expert_ids = assignments.expert_ids if ids is None else assignments.expert_ids[ids]
    return expert_ids >= assignments.num_routed


def _not_held(assignments: Assignments, pairs: Pairs) -> Pairs:
    """The pairs whose expert is none of those that the token has, after rerouting."""
    width = assignments.num_experts
    held = assignments.token_ids * width + assignments.expert_ids
    return pairs.at(~torch.isin(pairs.token_ids * width + pairs.expert_ids, held))


def _norms(scores: Tensor, token_ids: Tensor, norm_p: float, *, num_tokens: int) -> Tensor:
    smallest = torch.finfo(scores.dtype).tiny
    if norm_p == 1.0:
        return sum_per_token(scores, token_ids, num_tokens=num_tokens).clamp_min(smallest)
    # Powers of small scores underflow, so the largest score is taken out: the sum of the rest is at least 1.
    largest = largest_per_token(scores, token_ids, num_tokens=num_tokens).clamp_min(smallest)
    powers = (scores / largest[token_ids]) ** norm_p
    sums = sum_per_token(powers, token_ids, num_tokens=num_tokens)
    return largest * sums.clamp_min(1.0) ** (1.0 / norm_p)
