"""How scores become weights, and sums per token: shared by planning, combining and the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments, WeightRule


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


def weigh_assignments(assignments: Assignments, ids: Tensor | None = None) -> Tensor:
    """Weights of assignments, normalised over exactly those that are given; a shared expert's score is its weight.

    Args:
        assignments: What was asked for.
        ids: Which of them, int64 ``(num_pairs,)``; all when None.

    Returns:
        ``(num_pairs,)`` in the dtype of the scores.
    """
    scores, token_ids = assignments.scores, assignments.token_ids
    if ids is not None:
        scores, token_ids = scores[ids], token_ids[ids]
    rule, num_tokens = assignments.weight_rule, assignments.num_tokens
    if not assignments.num_shared:
        return apply_weight_rule(scores, token_ids, rule, num_tokens=num_tokens)
    expert_ids = assignments.expert_ids if ids is None else assignments.expert_ids[ids]
    is_shared = expert_ids >= assignments.num_routed
    routed = apply_weight_rule(scores.masked_fill(is_shared, 0.0), token_ids, rule, num_tokens=num_tokens)
    return torch.where(is_shared, scores, routed)


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
    return weigh_assignments(assignments)


def _norms(scores: Tensor, token_ids: Tensor, norm_p: float, *, num_tokens: int) -> Tensor:
    smallest = torch.finfo(scores.dtype).tiny
    if norm_p == 1.0:
        return sum_per_token(scores, token_ids, num_tokens=num_tokens).clamp_min(smallest)
    # Powers of small scores underflow, so the largest score is taken out: the sum of the rest is at least 1.
    largest = largest_per_token(scores, token_ids, num_tokens=num_tokens).clamp_min(smallest)
    powers = (scores / largest[token_ids]) ** norm_p
    sums = sum_per_token(powers, token_ids, num_tokens=num_tokens)
    return largest * sums.clamp_min(1.0) ** (1.0 / norm_p)
