"""Learning a gate from a reward: the score-function gradient of the experts that it sampled, and its baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_runtime.errors import ConfigError, ShapeError
from moe_runtime.routing.losses import entropy_loss
from moe_runtime.routing.policy import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments


def reinforce_loss(
    router_logits: Tensor,
    assignments: Assignments,
    rewards: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    entropy_bonus: float = 0.0,
) -> Tensor:
    """A loss whose gradient is, on average, minus that of the mean reward and of the entropy's bonus.

    ``mean(-(reward - baseline) * log P(experts)) - entropy_bonus * mean(entropy)`` over the tokens that have
    assignments (Bengio et al. 2015, https://arxiv.org/abs/1511.06297, section 3). It is no measure of how well the gate
    does: only its gradient means something.

    Args:
        router_logits: What the experts were sampled from, ``(num_tokens, num_experts)``; it gets the gradient.
        assignments: What the ``reinforce`` policy sampled from them in training, before anything was rerouted.
        rewards: One per token, ``(num_tokens,)``, such as minus its loss; those of padding are not read.
        baseline: What is subtracted from the rewards, one number or ``(num_tokens,)``. It lowers the variance, and
            must not depend on what was sampled now.
        entropy_bonus: Weight of the entropy of the tokens' distributions, which keeps the gate exploring.

    Returns:
        A scalar, float32 or wider; 0 for a batch without assignments.

    Raises:
        ShapeError: If the rewards are not one per token.
    """
    if rewards.shape != router_logits.shape[:1]:
        raise ShapeError(
            f"rewards: expected one per token, shape ({router_logits.shape[0]},), found {tuple(rewards.shape)}"
        )
    logits = at_least_float32(router_logits)
    valid = torch.unique(assignments.token_ids)
    num_valid = max(valid.shape[0], 1)
    # Rewards of padding may be anything: they are left out before they meet a 0, which NaN would survive.
    advantages = (rewards - baseline).detach().to(logits)[valid]
    loss: Tensor = -(advantages * sampling_log_probs(logits, assignments)[valid]).sum() / num_valid
    if entropy_bonus == 0.0:
        return loss
    return loss + entropy_bonus * entropy_loss(logits[valid])


def sampling_log_probs(router_logits: Tensor, assignments: Assignments) -> Tensor:
    """The log-probability of each token's experts in their order, drawn without replacement (Plackett-Luce).

    ``sum_c (logit[e_c] - logsumexp(logits but those of e_0 .. e_(c-1)))``.

    Args:
        router_logits: Float32 or wider ``(num_tokens, num_experts)``.
        assignments: The experts; ranks are the order.

    Returns:
        ``(num_tokens,)`` in the dtype of the logits; 0 for a token without assignments.
    """
    log_probs = router_logits.new_zeros(router_logits.shape[0])
    taken = torch.zeros_like(router_logits, dtype=torch.bool)
    most = int(assignments.ranks.max()) + 1 if assignments.num_assignments else 0
    for rank in range(most):
        drawn = assignments.ranks == rank
        tokens, experts = assignments.token_ids[drawn], assignments.expert_ids[drawn]
        left = router_logits[tokens].masked_fill(taken[tokens], -torch.inf)
        chances = router_logits[tokens, experts] - torch.logsumexp(left, dim=-1)
        log_probs = log_probs.index_add(0, tokens, chances)
        taken[tokens, experts] = True
    return log_probs


class RunningBaseline(nn.Module):
    """The running mean of the rewards of the steps so far, the newest counting most: a baseline that costs nothing.

    Use ``value`` for a step's loss first and ``update`` it then, so that it does not depend on what that step sampled.
    A module for its ``state_dict``: checkpoints keep it beside the gate.

    Args:
        decay: What a step counts for one step later, 0 to 1; 1 weighs all steps alike.

    Raises:
        ConfigError: If the decay is not within 0 and 1.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay: expected 0 to 1, found {decay}")
        self.decay = decay
        # float64: at float32, counts of steps stand still at 2**24.
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The mean so far, float64 scalar; 0 before the first update."""
        return self.total / self.weight.clamp_min(torch.finfo(torch.float64).tiny)

    def update(self, rewards: Tensor) -> None:
        """Counts the mean reward of one step; without rewards it stays as it is.

        Args:
            rewards: Of the step's valid tokens, ``(num_tokens,)``.
        """
        if rewards.numel() == 0:
            return
        self.total = self.total * self.decay + rewards.detach().double().mean()
        self.weight = self.weight * self.decay + 1.0
