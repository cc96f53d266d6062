"""Groups of neighbouring experts, of which a token keeps the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """A token's experts come from its best groups: what spares a batch some nodes.

    DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.2.2) and -V3 (https://arxiv.org/abs/2412.19437).

    Attributes:
        num_groups: Groups of equal size.
        num_kept: Groups that a token's experts may come from.
        score: What a group is worth: the sum of its two best experts' scores (the only one's, in a group of one), or
            the best.
    """

    num_groups: int
    num_kept: int
    score: Literal["top2_sum", "max"]

    def apply(self, scores: Tensor) -> Tensor:
        """The scores ``(num_tokens, num_experts)``, -inf for the experts of groups that are left out."""
        grouped = by_group(scores, num_groups=self.num_groups)
        if self.score == "max":
            group_scores = grouped.amax(-1)
        else:
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        return only_in_groups(scores, group_scores.topk(self.num_kept, dim=-1).indices, num_groups=self.num_groups)


def by_group(values: Tensor, *, num_groups: int) -> Tensor:
    """Values ``(num_tokens, num_experts)`` as ``(num_tokens, num_groups, group_size)``."""
    return values.reshape(values.shape[0], num_groups, values.shape[1] // num_groups)


def only_in_groups(scores: Tensor, group_ids: Tensor, *, num_groups: int) -> Tensor:
    """The scores of experts in some groups, -inf for the others.

    Args:
        scores: ``(num_tokens, num_experts)``.
        group_ids: Which groups each token keeps, int64 ``(num_tokens, num_kept)``.
        num_groups: Groups of equal size; neighbouring experts form one.

    Returns:
        Of the shape and dtype of ``scores``.
    """
    left_out = torch.ones(scores.shape[0], num_groups, dtype=torch.bool, device=scores.device)
    left_out = left_out.scatter(1, group_ids, False)
    # -inf, not 0: a negative biased score of a group that is kept would lose to it.
    return by_group(scores, num_groups=num_groups).masked_fill(left_out[:, :, None], -torch.inf).flatten(1)
