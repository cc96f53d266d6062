"""What became of a batch, as a table that is easy to compare: one row per token, one column per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.combine import combine

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan


def weight_table(plan: DispatchPlan) -> Tensor:
    """Weights as they are applied, ``(num_tokens, num_experts)``; NaN where a token does not go or was dropped."""
    assignments = plan.admission.assignments
    tokens, answers = torch.zeros(assignments.num_tokens, 1), torch.zeros(plan.num_planned, 1)
    weights = combine(tokens, answers, plan, residual="none", weight_on="output").weights
    table = torch.full((assignments.num_tokens, assignments.num_experts), torch.nan)
    table[plan.token_ids, plan.expert_ids] = weights
    return table
