"""Sinkhorn: each token's best experts after the batch's scores were scaled to equal loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policy import Policy
from moe_runtime.routing.scaling import gaps_to_best, scale_columns

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo


@dataclass(frozen=True, kw_only=True)
class SinkhornPolicy(Policy):
    """Training takes the best experts of the scaled scores; evaluation those of the logits.

    Clark et al. 2022 (https://arxiv.org/abs/2202.01169), section 3. The scaling is of the selection alone. Weights are
    the sigmoid of the logit where the layer has one expert per token, else the softmax over all logits.

    Attributes:
        tolerance: The scaling ends when the load of no expert is further than this share from the mean.
        max_iterations: It ends after so many rounds anyway.
    """

    tolerance: float = 1e-4
    max_iterations: int = 100

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        width = self.num_choices(info)
        preferences = logits
        if info.training or self.batch_coupled:
            preferences = self._scaled(logits.detach(), info.mask)
        expert_ids = torch.topk(preferences, width, dim=-1).indices
        scores = torch.sigmoid(logits) if self.max_k == 1 else torch.softmax(logits, dim=-1)
        grid = Grid(expert_ids, scores.gather(1, expert_ids))
        return self.assignments(only_requested(grid, requested_choices(width, info)), logits)

    def _scaled(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Logits plus the price of each expert: their order in a row is that of the scaled matrix."""
        gaps = gaps_to_best(logits.double())
        valid = gaps if mask is None else gaps[mask.bool()]
        # One token has nobody to share with: scaled to equal loads, all of its entries would be the same.
        if valid.shape[0] <= 1:
            return gaps
        return gaps + scale_columns(valid.exp(), tolerance=self.tolerance, max_iterations=self.max_iterations).log()
