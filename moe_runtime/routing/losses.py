"""Auxiliary losses that keep a gate balanced, and its logits small; all are means over valid tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.policy import at_least_float32
from moe_runtime.routing.probabilities import log_probabilities
from moe_runtime.routing.weights import requested_weights

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.gates import NoisyLogits
    from moe_runtime.routing.probabilities import ProbabilityScore

# Keeps the coefficient of variation finite where every expert has 0 (Shazeer's own code).
_EPSILON = 1e-10


def load_balancing_loss(
    router_logits: Tensor,
    assignments: Assignments,
    *,
    mask: Tensor | None = None,
    score: ProbabilityScore = "softmax",
) -> Tensor:
    """``num_experts * sum(f_i * P_i)`` of Switch Transformers (https://arxiv.org/abs/2101.03961), eq. 4.

    ``f_i`` is the share of the requested assignments, before drops, that went to expert i: divided by ``k``,
    unlike Hugging Face's. ``P_i`` is the mean probability of expert i. Exactly 1 at uniform routing.
    The usual coefficient is 1e-2.

    Args:
        router_logits: ``(num_tokens, num_experts)``; of a policy with two levels, the logarithms of the experts'
            probabilities.
        assignments: What the policy asked for; the gradient goes through the probabilities alone.
        mask: Bool ``(num_tokens,)``, the one that the policy got; rows that are False are padding.
        score: How logits become probabilities.

    Returns:
        A scalar, at least float32; 0 for a batch without valid tokens.

    Raises:
        ShapeError: If there is not one logit per token and expert.
    """
    _check_one_per_expert(router_logits, assignments, loss="load_balancing_loss")
    probabilities = log_probabilities(router_logits, score=score).exp()
    counts = torch.bincount(assignments.expert_ids, minlength=assignments.num_experts).to(probabilities.dtype)
    shares = counts / counts.sum().clamp_min(1)
    return assignments.num_experts * (shares * _mean_over_valid(probabilities, mask)).sum()


def sequence_balance_loss(
    router_logits: Tensor,
    assignments: Assignments,
    *,
    sequence_ids: Tensor,
    mask: Tensor | None = None,
    score: ProbabilityScore = "softmax",
) -> Tensor:
    """The mean over sequences of each one's ``load_balancing_loss`` (DeepSeek-V3, eq. 17).

    https://arxiv.org/abs/2412.19437; there ``score`` is ``sigmoid``. Exactly 1 where every sequence is routed
    uniformly. A sequence counts that has a valid token; one whose tokens ask for no expert counts as 0. The usual
    coefficient is 1e-4.

    Args:
        router_logits: As for ``load_balancing_loss``.
        assignments: What the policy asked for; the gradient goes through the probabilities alone.
        sequence_ids: Integers ``(num_tokens,)``: tokens of one number are of one sequence, wherever they stand.
        mask: Bool ``(num_tokens,)``, the one that the policy got; rows that are False are padding.
        score: How logits become probabilities.

    Returns:
        A scalar, at least float32; 0 for a batch without valid tokens.

    Raises:
        ShapeError: If there is not one logit per token and expert, or not one sequence per token.
    """
    _check_one_per_expert(router_logits, assignments, loss="sequence_balance_loss")
    _check_one_per_token(sequence_ids, router_logits, name="sequence_ids")
    probabilities = log_probabilities(router_logits, score=score).exp()
    sequences = torch.unique(sequence_ids, return_inverse=True)[1]
    num_sequences = int(sequences.max()) + 1 if len(sequences) else 0
    valid = _only_valid(sequences, mask)
    sizes = torch.bincount(valid, minlength=num_sequences)
    means = _sum_by(valid, _only_valid(probabilities, mask), num_groups=num_sequences) / sizes.clamp_min(1)[:, None]
    asked = sequences[assignments.token_ids] * assignments.num_experts + assignments.expert_ids
    counts = torch.bincount(asked, minlength=num_sequences * assignments.num_experts).view_as(means).to(means.dtype)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return assignments.num_experts * (shares * means).sum() / (sizes > 0).sum().clamp_min(1)


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
    return _mean_over_valid(torch.logsumexp(at_least_float32(router_logits), dim=-1) ** 2, mask)


def entropy_loss(router_logits: Tensor, *, mask: Tensor | None = None, score: ProbabilityScore = "softmax") -> Tensor:
    """Minus the mean entropy of the tokens' probabilities, in nats: less for a gate that is unsure.

    The bonus that keeps a sampling policy exploring (Williams and Peng 1991). From ``-log(num_experts)``, where
    every token is as likely to go to any expert, to 0.

    Args:
        router_logits: ``(num_tokens, num_experts)``.
        mask: Bool ``(num_tokens,)``; rows that are False are padding.
        score: How logits become probabilities.

    Returns:
        A scalar, at least float32; 0 for a batch without valid tokens.
    """
    logs = log_probabilities(router_logits, score=score)
    return _mean_over_valid((logs.exp() * logs).sum(dim=-1), mask)


def mutual_information_loss(
    router_logits: Tensor, tasks: Tensor, *, mask: Tensor | None = None, score: ProbabilityScore = "softmax"
) -> Tensor:
    """Minus the mutual information, in nats, of a token's task and its expert (Mod-Squad).

    ``-sum P(T, E) log(P(T, E) / (P(T) P(E)))``, https://arxiv.org/abs/2212.08066: less where each task has
    few experts of its own, and all experts are used. ``P(T)`` is the share of the valid tokens that are of the task,
    and ``P(E | T)`` the mean of their probabilities. From ``-log(min(num_tasks, num_experts))`` to 0, where all tasks
    use the experts alike.

    Args:
        router_logits: ``(num_tokens, num_experts)``.
        tasks: Integers ``(num_tokens,)``: the task of each token.
        mask: Bool ``(num_tokens,)``; rows that are False are padding.
        score: How logits become probabilities.

    Returns:
        A scalar, at least float32; 0 for a batch without valid tokens.

    Raises:
        ShapeError: If there is not one task per token.
    """
    _check_one_per_token(tasks, router_logits, name="tasks")
    probabilities = _only_valid(log_probabilities(router_logits, score=score).exp(), mask)
    _, places, counts = torch.unique(_only_valid(tasks, mask), return_inverse=True, return_counts=True)
    num_valid = max(len(places), 1)
    joint = _sum_by(places, probabilities, num_groups=len(counts)) / num_valid
    independent = counts.to(joint.dtype)[:, None] / num_valid * joint.sum(dim=0)
    # Clamped: the gradient of a probability that underflowed would be 0 * infinity.
    smallest = torch.finfo(joint.dtype).tiny
    excess: Tensor = joint.clamp_min(smallest).log() - independent.clamp_min(smallest).log()
    return -(joint * excess).sum()


def _only_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def _mean_over_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    valid = _only_valid(values, mask)
    return valid.sum(0) / max(valid.shape[0], 1)


def _sum_by(groups: Tensor, rows: Tensor, *, num_groups: int) -> Tensor:
    return rows.new_zeros((num_groups, rows.shape[1])).index_add(0, groups, rows)


def _check_one_per_expert(router_logits: Tensor, assignments: Assignments, *, loss: str) -> None:
    expected = (assignments.num_tokens, assignments.num_experts)
    if router_logits.shape != expected:
        raise ShapeError(
            f"{loss}: expected router_logits of shape {expected}, one per token and expert, found "
            f"{tuple(router_logits.shape)}; of a policy with two levels, give the logarithms of the experts' "
            f"probabilities; a policy without a gate has no such loss"
        )


def _check_one_per_token(values: Tensor, router_logits: Tensor, *, name: str) -> None:
    if values.shape != router_logits.shape[:1]:
        raise ShapeError(
            f"{name}: expected one per token, shape ({router_logits.shape[0]},), found {tuple(values.shape)}"
        )


def _squared_variation(sums: Tensor) -> Tensor:
    return sums.var(correction=0) / (sums.mean() ** 2 + _EPSILON)
