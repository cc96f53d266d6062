"""Global assignment: one expert per token, every expert as many tokens, at the highest total score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policy import Policy
from moe_runtime.routing.seats import balanced_experts

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo
    from moe_runtime.routing.seats import Solver


@dataclass(frozen=True, kw_only=True)
class GlobalAssignmentPolicy(Policy):
    """Training balances the batch at the highest total of logits; evaluation takes each token's best expert.

    BASE layers, Lewis et al. 2021 (https://arxiv.org/abs/2103.16716). Every expert serves ``floor`` or ``ceil`` of
    ``tokens / experts``. The weight is the sigmoid of the logit; with the residual rule ``blend`` a layer's output is
    ``weight * expert(x) + (1 - weight) * x``, as there.

    Attributes:
        solver: How the balanced assignment is found.
    """

    solver: Solver = "auto"

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        requested = requested_choices(1, info)
        if info.training or self.batch_coupled:
            expert_ids = self._balanced(logits, None if requested is None else requested[:, 0])
        else:
            expert_ids = torch.topk(logits, 1, dim=-1).indices
        grid = Grid(expert_ids, torch.sigmoid(logits.gather(1, expert_ids)))
        return self.assignments(only_requested(grid, requested), logits)

    def _balanced(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """The expert of each token, int64 ``(num_tokens, 1)``; of padding, any."""
        if valid is None:
            return balanced_experts(logits, solver=self.solver)[:, None]
        rows = valid.nonzero().squeeze(1)
        experts = balanced_experts(logits[rows], solver=self.solver)
        return experts.new_zeros(logits.shape[0]).index_copy(0, rows, experts)[:, None]
