"""GShard's top-2: the best expert always, the second by chance of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.draws import uniform_draws
from moe_runtime.routing.policies.choices import chosen_pairs, only_requested, requested_choices
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.policies import SecondExpert
    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo

_SECOND = 1
_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class GShardPolicy(Policy):
    """Each token asks for its best expert, and perhaps for its second.

    GShard, Lepikhin et al. 2020 (https://arxiv.org/abs/2006.16668), algorithm 2; ``threshold`` is Mesh-TensorFlow's.
    With ``g2`` the second's share of the pair's probability, the second is kept where a uniform draw is below
    ``g2 / threshold`` or, with ``proportional``, below ``2 * g2``. The draw is a function of the row's seed.

    A second that is not kept is not asked for: it is no drop, and another assignment may be rerouted to it. As in the
    paper, the pair is normalised before chance decides: with ``normalize: before_drop`` the weight of a first expert
    that is left alone is its share of the pair, below 1. A token whose request asks for one expert has no pair.

    Attributes:
        second: How the second is kept in training.
        second_in_evaluation: The same outside training.
        threshold: Share above which ``threshold`` always keeps the second.
    """

    second: SecondExpert
    second_in_evaluation: SecondExpert
    threshold: float
    can_reroute: bool = True

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether the second is kept by chance outside training too."""
        return self.second_in_evaluation in ("threshold", "proportional")

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        all_scores = torch.softmax(logits, dim=-1)
        width = self.num_choices(info)
        scores, expert_ids = torch.topk(all_scores, width, dim=-1)
        grid, requested = Grid(expert_ids, scores), requested_choices(width, info)
        kept = self._kept(scores.detach(), info) if width > 1 else None
        left_out = None
        if kept is not None:
            asked = torch.ones_like(expert_ids, dtype=torch.bool) if requested is None else requested
            requested = asked & kept
            left_out = chosen_pairs(grid, asked & ~kept)
        return self.assignments(only_requested(grid, requested), logits, all_scores=all_scores, left_out=left_out)

    def _kept(self, scores: Tensor, info: TokenInfo) -> Tensor | None:
        """Which of each pair are kept, bool ``(num_tokens, 2)``; None is both, of every token."""
        rule = self.second if info.training else self.second_in_evaluation
        if rule == "always":
            return None
        if rule == "never":
            return torch.tensor([True, False], device=scores.device).expand(scores.shape)
        share = scores[:, _SECOND] / scores.sum(-1)
        chance = share / self.threshold if rule == "threshold" else 2 * share
        seeds = torch.arange(scores.shape[0]) if info.row_seeds is None else info.row_seeds
        second = uniform_draws(seeds.to(scores.device), _SECOND, stream=_STREAM) < chance
        return torch.stack([torch.ones_like(second), second], dim=1)
