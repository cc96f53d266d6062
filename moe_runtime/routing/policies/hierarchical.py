"""Two levels of softmax: which group of experts, then which expert inside it; scores are products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.policies.choices import chosen_pairs, only_requested, requested_choices
from moe_runtime.routing.policies.groups import by_group, only_in_groups
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo

#: Logits of the first level where it decides between the shared expert, which comes first, and the others.
_FIRST_LEVEL = 2


@dataclass(frozen=True, kw_only=True)
class TreePolicy(Policy):
    """Each token asks for the best experts of its best groups (Jordan and Jacobs 1994, Shazeer et al. 2017).

    The gate scores the groups, then the experts: logits ``[groups, experts]``, neighbouring experts forming a group. A
    score is ``softmax(groups) * softmax(experts of the group)``. Choices stand in order of their score, whatever
    their group; a request for fewer gets the best of them. Another group's expert never takes the place of a full one.

    Shazeer et al. 2017: https://arxiv.org/abs/1701.06538, appendix B.

    Attributes:
        num_groups: Groups of equal size.
        k_groups: Groups per token.
        k: Experts per token and group.
    """

    num_groups: int
    k_groups: int
    k: int
    can_reroute: bool = True

    @property
    def num_logits(self) -> int:
        """Width of the gate's output: groups, then experts."""
        return self.num_groups + self.num_experts

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        groups = torch.softmax(logits[:, : self.num_groups], dim=-1)
        inside = torch.softmax(by_group(logits[:, self.num_groups :], num_groups=self.num_groups), dim=-1)
        all_scores = (groups[:, :, None] * inside).flatten(1)
        group_ids = torch.topk(groups, self.k_groups, dim=-1).indices
        candidates = _best_inside(inside.detach(), group_ids, k=self.k)
        width = self.num_choices(info)
        scores, places = torch.topk(all_scores.gather(1, candidates), width, dim=-1)
        grid = Grid(candidates.gather(1, places), scores)
        return self.assignments(
            only_requested(grid, requested_choices(width, info)),
            logits,
            all_scores=all_scores,
            preferences=only_in_groups(all_scores.detach(), group_ids, num_groups=self.num_groups),
        )


@dataclass(frozen=True, kw_only=True)
class SharedFirstPolicy(Policy):
    """Each token asks for the shared expert, or for its best among the others, whichever the first level prefers.

    The shared expert is expert 0. Logits are ``[shared, others, expert 1, expert 2, ...]``; the score of the shared
    expert is its share of the first two, that of another ``softmax(first two)[others] * softmax(experts 1, 2, ...)``.
    The idea is that of NLLB's conditional routing (https://arxiv.org/abs/2207.04672), which sums both
    branches; here a token takes one. When its expert is full or fails, it may go to the other branch.
    """

    can_reroute: bool = True

    @property
    def num_logits(self) -> int:
        """Width of the gate's output: the shared expert, the others together, then each of these."""
        return _FIRST_LEVEL + self.num_experts - 1

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        branches = torch.softmax(logits[:, :_FIRST_LEVEL], dim=-1)
        others = branches[:, 1:] * torch.softmax(logits[:, _FIRST_LEVEL:], dim=-1)
        takes_shared = (branches[:, 0] >= branches[:, 1])[:, None]
        width = self.num_choices(info)
        scores, places = torch.topk(others, width, dim=-1)
        is_shared = takes_shared & (torch.arange(width, device=logits.device) == 0)
        grid = Grid((places + 1).masked_fill(is_shared, 0), torch.where(is_shared, branches[:, :1], scores))
        wanted = ~takes_shared | is_shared
        requested = requested_choices(width, info)
        return self.assignments(
            chosen_pairs(grid, wanted if requested is None else wanted & requested),
            logits,
            all_scores=torch.cat([branches[:, :1], others], dim=1),
        )


def _best_inside(inside: Tensor, group_ids: Tensor, *, k: int) -> Tensor:
    """The best ``k`` experts of some groups, int64 ``(num_tokens, num_kept * k)``.

    Args:
        inside: Scores of the experts of each group, ``(num_tokens, num_groups, group_size)``.
        group_ids: Which groups, int64 ``(num_tokens, num_kept)``.
        k: Experts per group.
    """
    group_size = inside.shape[-1]
    kept = inside.gather(1, group_ids[:, :, None].expand(-1, -1, group_size))
    return (group_ids[:, :, None] * group_size + torch.topk(kept, k, dim=-1).indices).flatten(1)
