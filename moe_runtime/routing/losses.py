"""Auxiliary losses that keep a gate balanced, and its logits small; all are means over valid tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import InvalidRequestError
from moe_runtime.routing.weights import requested_weights

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.gates import NoisyLogits

# Keeps the coefficient of variation finite where every expert has 0 (Shazeer's own code).
_EPSILON = 1e-10


def load_balancing_loss(router_logits: Tensor, assignments: Assignments, *, mask: Tensor | None = None) -> Tensor:
    """``num_experts * sum(f_i * P_i)`` of Switch Transformers (https://arxiv.org/abs/2101.03961), eq. 4.

    ``f_i`` is the share of the requested assignments, before drops, that went to expert i: divided by ``k``,
    unlike Hugging Face's. ``P_i`` is the mean probability of expert i. Exactly 1 at uniform routing.
    The usual coefficient is 1e-2.

    Args:
        router_logits: ``(num_tokens, num_experts)``.
        assignments: What the policy asked for; the gradient goes through the probabilities alone.
        mask: Bool ``(num_tokens,)``, the one that the policy got; rows that are False are padding.

    Returns:
        A scalar, float32; 0 for a batch without valid tokens.
    """
    probabilities = torch.softmax(_at_least_float32(router_logits), dim=-1)
    counts = torch.bincount(assignments.expert_ids, minlength=assignments.num_experts)
    shares = counts / counts.sum().clamp_min(1)
    return assignments.num_experts * (shares * _mean_over_valid(probabilities, mask)).sum()


def importance_loss(assignments: Assignments) -> Tensor:
    """Squared coefficient of variation of the experts' summed weights (https://arxiv.org/abs/1701.06538, eq. 7).

    Weights are those that requested assignments would have if none were dropped. Padding has no assignments,
    so it does not count. The usual coefficient is 1e-2.

    Returns:
        A scalar in the dtype of the scores; 0 when all sums are equal.
    """
    weights = requested_weights(assignments)
    importance = weights.new_zeros(assignments.num_experts).index_add(0, assignments.expert_ids, weights)
    return _squared_variation(importance)


def load_loss(logits: NoisyLogits, *, k: int, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of a smooth estimate of the experts' load (same paper, appendix A).

    The load of an expert is the sum over tokens of the probability that it would be among the token's ``k``
    best if its own noise were drawn anew. With ``k == num_experts`` every probability is 1, the load of each
    expert is the number of tokens, and the loss is 0. The usual coefficient is 1e-2.

    Args:
        logits: What a ``NoisyGate`` scored, each ``(num_tokens, num_experts)``.
        k: Experts per token.
        mask: Bool ``(num_tokens,)``; rows that are False are padding.

    Returns:
        A scalar, float32.

    Raises:
        InvalidRequestError: If ``k`` is not between 1 and the number of experts.
    """
    num_experts = logits.clean.shape[-1]
    if not 1 <= k <= num_experts:
        raise InvalidRequestError(f"load_loss: expected k of 1 to {num_experts}, found {k}")
    if k == num_experts:
        return logits.clean.sum() * 0.0
    best = torch.topk(logits.noisy, k + 1, dim=-1).values
    last_in, first_out = best[:, k - 1 : k], best[:, k : k + 1]
    # What an expert must beat is the k-th best of the others: the first one out, for an expert that is in.
    threshold = torch.where(logits.noisy > first_out, first_out, last_in)
    chances = torch.special.ndtr((logits.clean - threshold) / logits.noise_std)
    return _squared_variation(_only_valid(chances, mask).sum(0))


def z_loss(router_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean of ``logsumexp(logits) ** 2`` (ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5).

    The usual coefficient is 1e-3.

    Args:
        router_logits: ``(num_tokens, num_experts)``.
        mask: Bool ``(num_tokens,)``; rows that are False are padding.

    Returns:
        A scalar, float32; 0 for a batch without valid tokens.
    """
    return _mean_over_valid(torch.logsumexp(_at_least_float32(router_logits), dim=-1) ** 2, mask)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _only_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def _mean_over_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    valid = _only_valid(values, mask)
    return valid.sum(0) / max(valid.shape[0], 1)


def _squared_variation(sums: Tensor) -> Tensor:
    return sums.var(correction=0) / (sums.mean() ** 2 + _EPSILON)
