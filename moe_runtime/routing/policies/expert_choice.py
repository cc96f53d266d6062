"""Expert choice: each expert takes its tokens of the highest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moe_runtime.routing.assignments import Pairs
from moe_runtime.routing.capacity import share_per_expert
from moe_runtime.routing.places import positions_in_group
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo


@dataclass(frozen=True, kw_only=True)
class ExpertChoicePolicy(Policy):
    """Each expert takes its ``ceil(capacity_factor * tokens / experts)`` tokens of the highest score.

    Zhou et al. 2022 (https://arxiv.org/abs/2202.09368). Some tokens get no expert, others many: a token's choices
    are the experts that took it, best score first. Selection is ``torch.topk``, ties included.

    Attributes:
        capacity_factor: Experts per token, on average.
        score: How logits become scores.
    """

    capacity_factor: float
    score: Literal["softmax", "sigmoid"] = "softmax"
    batch_coupled: bool = True
    accepts_k: bool = False
    sets_capacity: bool = True

    @property
    def mean_k(self) -> float:
        """Experts that a token gets on average, but for rounding."""
        return min(self.capacity_factor, float(self.num_experts))

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the experts of a batch ask for; see ``Policy.assign``."""
        scores = torch.softmax(logits, dim=-1) if self.score == "softmax" else torch.sigmoid(logits)
        by_expert = scores.t()
        if info.mask is not None:
            by_expert = by_expert.masked_fill(~info.mask.bool(), -torch.inf)
        num_valid = logits.shape[0] if info.mask is None else int(info.mask.sum())
        capacity = share_per_expert(num_valid, factor=self.capacity_factor, num_experts=self.num_experts)
        taken = torch.topk(by_expert, min(capacity, num_valid), dim=-1)
        return self.assignments(_by_choice(taken.indices, taken.values, num_tokens=logits.shape[0]), logits)


def _by_choice(taken: Tensor, scores: Tensor, *, num_tokens: int) -> Pairs:
    """What the experts took, ``(num_experts, capacity)``, as choices of the tokens, best score first."""
    num_experts, capacity = taken.shape
    token_ids, flat_scores = taken.reshape(-1), scores.reshape(-1)
    best_first = torch.argsort(flat_scores.detach(), descending=True, stable=True)
    sizes = torch.bincount(token_ids, minlength=num_tokens)
    ranks = positions_in_group(token_ids, order=best_first, sizes=sizes)
    order = torch.argsort(ranks * num_tokens + token_ids)
    expert_ids = torch.arange(num_experts, device=taken.device).repeat_interleave(capacity)
    return Pairs(
        token_ids=token_ids[order], expert_ids=expert_ids[order], scores=flat_scores[order], ranks=ranks[order]
    )
