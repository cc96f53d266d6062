"""Token choice: each token asks for its experts of the highest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moe_runtime.errors import ShapeError
from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policies.groups import GroupLimit
    from moe_runtime.routing.policy import TokenInfo

Score = Literal["softmax", "sigmoid", "softmax_after_topk"]


@dataclass(frozen=True, kw_only=True)
class TopKPolicy(Policy):
    """Each token asks for its ``max_k`` experts of the highest score.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538). ``dense`` is the case of all experts, ``switch``
    that of one expert with its un-normalised probability. Selection is ``torch.topk``, ties included.

    With ``uses_bias`` experts are selected, and preferred when another is full, by their score plus the bias that
    balances them; weights are made of the score alone (DeepSeek-V3, https://arxiv.org/abs/2408.15664).

    Attributes:
        score: How logits become scores.
        groups: Limits a token's experts to its best groups of them, the bias included; None is no limit.
    """

    score: Score = "softmax"
    groups: GroupLimit | None = None
    can_reroute: bool = True

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        all_scores = self._all_scores(logits)
        preferences = self._preferences(all_scores, info)
        width = self.num_choices(info)
        scores, expert_ids = torch.topk(all_scores if preferences is None else preferences, width, dim=-1)
        if preferences is not None:
            scores = all_scores.gather(1, expert_ids)
        requested = requested_choices(width, info)
        if self.score == "softmax_after_topk":
            scores = _softmax_over(scores, requested)
        return self.assignments(
            only_requested(Grid(expert_ids, scores), requested),
            logits,
            all_scores=all_scores if self.can_reroute else None,
            preferences=preferences,
        )

    def _all_scores(self, logits: Tensor) -> Tensor:
        if self.score == "softmax":
            return torch.softmax(logits, dim=-1)
        return torch.sigmoid(logits) if self.score == "sigmoid" else logits

    def _preferences(self, all_scores: Tensor, info: TokenInfo) -> Tensor | None:
        """What experts are selected by, where it is not their scores; no gradient goes through a selection."""
        bias = info.expert_bias if self.uses_bias else None
        if bias is None and self.groups is None:
            return None
        preferences = all_scores.detach()
        if bias is not None:
            if bias.shape != (self.num_experts,):
                raise ShapeError(f"expert_bias: expected shape ({self.num_experts},), found {tuple(bias.shape)}")
            preferences = preferences + bias
        return preferences if self.groups is None else self.groups.apply(preferences)


def _softmax_over(logits: Tensor, requested: Tensor | None) -> Tensor:
    if requested is not None:
        # The lowest number, not -inf: a row that asks for nothing would be NaN, and poison its gradient.
        logits = logits.masked_fill(~requested, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1)
