"""Shared experts: every valid token goes to them too, outside of k, capacity, normalisation and losses.

After the capacity and before the plan: capacity -> shared experts -> plan. From there on they are experts like others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ShapeError
from moe_runtime.routing.assignments import Grid, Pairs, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission, Assignments


def add_shared_experts(
    admission: Admission, *, num_shared: int, weights: Tensor | None = None, mask: Tensor | None = None
) -> Admission:
    """The admission with all valid tokens at the shared experts as well, behind their own choices.

    Shared experts are the ids ``[num_experts, num_experts + num_shared)``; each always has a place
    (DeepSeekMoE, https://arxiv.org/abs/2401.06066, section 3.2).

    Args:
        admission: What the policy asked for, after capacity.
        num_shared: Shared experts of the layer; the admission itself comes back for 0.
        weights: Weight of each shared expert for each token, ``(num_tokens, num_shared)``; 1 when None.
        mask: Bool ``(num_tokens,)``; rows that are False are padding; none is when None.

    Raises:
        ShapeError: If the weights have another shape.
    """
    if num_shared == 0:
        return admission
    assignments = admission.assignments
    shape = (assignments.num_tokens, num_shared)
    if weights is not None and weights.shape != shape:
        raise ShapeError(f"weights of shared experts: expected shape {shape}, found {tuple(weights.shape)}")
    scores = assignments.choices.scores.new_ones(shape) if weights is None else weights.to(assignments.choices.scores)
    first = assignments.num_experts
    ids = torch.arange(first, first + num_shared, device=scores.device).expand(shape)
    own = assignments.grid
    if own is not None and admission.selection is None and mask is None:
        grid = Grid(torch.cat([own.expert_ids, ids], dim=1), torch.cat([own.scores, scores], dim=1))
        return replace(admission, assignments=_with(assignments, grid, num_shared))
    shared = _valid(Grid(ids, scores), mask)
    return _append(admission, replace(shared, ranks=shared.ranks + _num_ranks(assignments)), num_shared)


def without_shared(admission: Admission) -> Admission:
    """What the policy asked for alone; the admission itself where no expert is shared."""
    assignments = admission.assignments
    if not assignments.num_shared:
        return admission
    stop = _num_routed_assignments(assignments)
    routed = replace(
        assignments,
        choices=assignments.pairs.at(slice(0, stop)),
        num_experts=assignments.num_routed,
        num_shared=0,
    )
    selection = admission.selection
    if selection is not None:
        asked = selection.asked_expert_ids
        selection = Selection(
            admitted=selection.admitted[:stop],
            rerouted=selection.rerouted[:stop],
            asked_expert_ids=None if asked is None else asked[:stop],
        )
    return replace(admission, assignments=routed, selection=selection)


def with_shared_of(admission: Admission, routed: Admission) -> Admission:
    """The part of an admission that the policy asked for, replaced: the inverse of ``without_shared``."""
    assignments = admission.assignments
    if not assignments.num_shared:
        return routed
    start = _num_routed_assignments(assignments)
    return _append(routed, assignments.pairs.at(slice(start, None)), assignments.num_shared)


def _append(admission: Admission, shared: Pairs, num_shared: int) -> Admission:
    assignments, selection = admission.assignments, admission.selection
    own = assignments.pairs
    pairs = Pairs(
        token_ids=torch.cat([own.token_ids, shared.token_ids]),
        expert_ids=torch.cat([own.expert_ids, shared.expert_ids]),
        scores=torch.cat([own.scores, shared.scores]),
        ranks=torch.cat([own.ranks, shared.ranks]),
    )
    if selection is not None:
        asked = selection.asked_expert_ids
        all_of_them = torch.ones_like(shared.token_ids, dtype=torch.bool)
        selection = Selection(
            admitted=torch.cat([selection.admitted, all_of_them]),
            rerouted=torch.cat([selection.rerouted, ~all_of_them]),
            asked_expert_ids=None if asked is None else torch.cat([asked, shared.expert_ids]),
        )
    return replace(admission, assignments=_with(assignments, pairs, num_shared), selection=selection)


def _with(assignments: Assignments, choices: Pairs | Grid, num_shared: int) -> Assignments:
    num_experts = assignments.num_experts + num_shared
    return replace(assignments, choices=choices, num_experts=num_experts, num_shared=num_shared)


def _valid(grid: Grid, mask: Tensor | None) -> Pairs:
    return grid.pairs if mask is None else grid.pairs.at(mask.bool().repeat(grid.k))


def _num_ranks(assignments: Assignments) -> int:
    """Choices of the token that has most."""
    if assignments.grid is not None:
        return assignments.grid.k
    return int(assignments.ranks.max()) + 1 if assignments.num_assignments else 0


def _num_routed_assignments(assignments: Assignments) -> int:
    # Shared ones are behind all others, whose places they therefore leave as they are.
    return assignments.num_assignments - int((assignments.expert_ids >= assignments.num_routed).sum())
