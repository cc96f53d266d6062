"""Drop orders: who takes a place first when an expert cannot take everyone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from moe_runtime.routing.draws import hash_choices
from moe_runtime.routing.weights import largest_per_token

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments

DropRule = Literal["position", "priority", "score", "random"]


def drop_order(assignments: Assignments, rule: DropRule, *, row_seeds: Tensor | None) -> Tensor | None:
    """The assignments in the order in which they take places; ties go by position.

    ``position`` is the order of the assignments, k-major. ``priority`` sorts tokens by their best score, the largest
    of their choices, and stays k-major (batch priority routing of V-MoE, https://arxiv.org/abs/2106.05974). ``score``
    sorts assignments by their own score; ``random`` by a hash of the row's seed and the choice.

    Args:
        assignments: In k-major order.
        rule: Which order.
        row_seeds: int64 ``(num_tokens,)`` for ``random``; the row's index when None.

    Returns:
        A permutation, int64 ``(num_assignments,)``; None is the order they stand in.
    """
    if rule == "position":
        return None
    if rule == "score":
        return torch.argsort(assignments.scores.detach(), descending=True, stable=True)
    if rule == "priority":
        best = largest_per_token(assignments.scores, assignments.token_ids, num_tokens=assignments.num_tokens)[
            assignments.token_ids
        ]
        by_score = torch.argsort(best, descending=True, stable=True)
        return by_score[torch.argsort(assignments.ranks[by_score], stable=True)]
    seeds = assignments.token_ids if row_seeds is None else row_seeds[assignments.token_ids]
    return torch.argsort(hash_choices(seeds, assignments.ranks), stable=True)
