"""Sparsemixer: two experts, each weighed against those near it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid, WeightRule
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policy import Policy
from moe_runtime.routing.weights import near_softmax

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo


@dataclass(frozen=True, kw_only=True)
class SparseMixerPolicy(Policy):
    """Each token asks for its best expert, then, with that one masked, for its best again.

    Phi-3.5-MoE's router in its evaluation form, in training too (https://arxiv.org/abs/2409.12136): an expert's weight
    is its softmax over the logits that lie within ``limit`` of it, relative to their size, better ones masked. The two
    weights do not sum to 1. Where a full expert makes way for a third, that one's weight is what it would be with
    the full expert masked.

    Attributes:
        limit: Twice the jitter.
    """

    limit: float
    can_reroute: bool = True

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        width = self.num_choices(info)
        expert_ids = logits.argmax(dim=-1, keepdim=True)
        if width > 1:
            second = logits.scatter(1, expert_ids, -torch.inf).argmax(dim=-1, keepdim=True)
            expert_ids = torch.cat([expert_ids, second], dim=1)
        scores = [near_softmax(logits, chosen, limit=self.limit) for chosen in expert_ids.unbind(1)]
        grid = Grid(expert_ids, torch.stack(scores, dim=1))
        return self.assignments(only_requested(grid, requested_choices(width, info)), logits, all_scores=logits)


def sparsemixer_rule(limit: float) -> WeightRule:
    """How sparsemixer's scores become weights: they are weights."""
    return WeightRule(normalize="none", softmax_within=limit)
