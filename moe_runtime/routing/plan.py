"""The dispatch plan: which row goes to which expert. Fourth stage: capacity -> plan -> dispatch -> combine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.routing.assignments import DispatchPlan
from moe_runtime.routing.places import count_per_expert, order_by_group
from moe_runtime.routing.weights import requested_weights, weigh_assignments, weigh_grid

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission, Assignments, Grid


def plan_dispatch(admission: Admission) -> DispatchPlan:
    """The admitted assignments ordered by expert, then by token, with their weights.

    With ``normalize: before_drop`` a token's weights are normalised over all its assignments, those without a
    place included; with ``after_drop`` over those that have one.
    """
    grid = admission.assignments.grid
    if grid is not None and admission.selection is None:
        return _plan_of_grid(admission, grid)
    return _plan_of_pairs(admission)


def _plan_of_grid(admission: Admission, grid: Grid) -> DispatchPlan:
    # Row by row, a grid is by token, then by choice: a stable sort by expert leaves each expert's rows by token.
    assignments = admission.assignments
    order = order_by_group(grid.expert_ids.reshape(-1), num_groups=assignments.num_experts)
    weights = weigh_grid(grid.scores, assignments.weight_rule, num_shared=assignments.num_shared)
    return DispatchPlan(
        order=order,
        token_ids=order // grid.k,
        weights_by_token=weights.reshape(-1),
        ids_by_token=grid,
        rows_per_expert=assignments.load,
        admission=admission,
    )


def _plan_of_pairs(admission: Admission) -> DispatchPlan:
    assignments = admission.assignments
    ids = order_by_group(assignments.token_ids, num_groups=assignments.num_tokens)
    if admission.selection is not None:
        ids = ids[admission.admitted[ids]]
    token_ids, expert_ids = assignments.token_ids[ids], assignments.expert_ids[ids]
    order = order_by_group(expert_ids, num_groups=assignments.num_experts)
    return DispatchPlan(
        order=order,
        token_ids=token_ids[order],
        weights_by_token=weigh_planned(assignments, ids),
        ids_by_token=ids,
        rows_per_expert=count_per_expert(expert_ids, num_experts=assignments.num_experts),
        admission=admission,
    )


def weigh_planned(assignments: Assignments, ids: Tensor) -> Tensor:
    """Weights of the planned assignments by the assignments' rule, as if all of them will be served.

    Args:
        assignments: What was asked for.
        ids: The planned ones, int64 ``(num_planned,)``.

    Returns:
        ``(num_planned,)``, in the order of ``ids``.
    """
    if assignments.weight_rule.normalize == "before_drop":
        return requested_weights(assignments)[ids]
    return weigh_assignments(assignments, ids)
