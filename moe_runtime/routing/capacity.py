"""Capacity: which assignments get a place at their expert. Third stage: policy -> capacity -> plan."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Admission, Selection
from moe_runtime.routing.drop_order import drop_order
from moe_runtime.routing.places import positions_in_group
from moe_runtime.routing.reroute import reroute

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.models import CapacityConfig
    from moe_runtime.routing.assignments import Assignments


def expert_capacity(num_assignments: int, *, num_valid: int, num_experts: int, rule: CapacityConfig) -> int | None:
    """Assignments that one expert accepts in a batch: ``ceil(factor * num_assignments / num_experts)``.

    Exact: the float product ``1.1 * 100 / 10`` would round up to 12.

    Args:
        num_assignments: Assignments that the valid rows ask for.
        num_valid: Rows that ask for any; a capacity above it means nothing.
        num_experts: Experts of the layer.
        rule: The factor and the minimum.

    Returns:
        At least ``rule.min`` and at most ``num_valid``; None where the factor is null (dropless).
    """
    if rule.factor is None:
        return None
    wanted = share_per_expert(num_assignments, factor=rule.factor, num_experts=num_experts)
    return min(max(wanted, rule.min), num_valid)


def share_per_expert(number: int, *, factor: float, num_experts: int) -> int:
    """``ceil(factor * number / num_experts)``, in exact arithmetic on the factor as it is written."""
    return math.ceil(_exact(factor) * number / num_experts)


def admit(assignments: Assignments, rule: CapacityConfig, *, row_seeds: Tensor | None = None) -> Admission:
    """The assignments that find a place, at their own expert or, where the rule says so, at another.

    Args:
        assignments: What the policy asks for.
        rule: Capacity, who is dropped when an expert is full, and whether overflow is rerouted.
        row_seeds: int64 ``(num_tokens,)``, used by ``drop: random`` only: who is dropped depends on each row's
            seed and choice, never on a generator's state. The row's index when None.

    Returns:
        The admission, in the order of ``assignments``.

    Raises:
        ConfigError: If overflow is to be rerouted and the assignments carry no scores for it.
    """
    if rule.factor is None:
        return Admission(assignments, capacity=None)
    capacity = expert_capacity(
        assignments.num_assignments, num_valid=_num_valid(assignments), num_experts=assignments.num_experts, rule=rule
    )
    if capacity is None or max(assignments.load) <= capacity:
        return Admission(assignments, capacity=capacity)

    order = drop_order(assignments, rule.drop, row_seeds=row_seeds)
    sizes = torch.tensor(assignments.load, device=assignments.expert_ids.device)
    positions = positions_in_group(assignments.expert_ids, order=order, sizes=sizes)
    selection = Selection(
        admitted=positions < capacity, rerouted=torch.zeros_like(assignments.token_ids, dtype=torch.bool)
    )
    admission = Admission(assignments, capacity=capacity, selection=selection)
    if rule.overflow == "drop":
        return admission
    return reroute(admission, order=order, capacity=capacity, max_reroutes=rule.max_reroutes)


@lru_cache(maxsize=256)
def _exact(factor: float) -> Fraction:
    return Fraction(str(factor))


def _num_valid(assignments: Assignments) -> int:
    if assignments.grid is not None:
        return assignments.num_tokens
    asked = torch.zeros(assignments.num_tokens, dtype=torch.bool, device=assignments.token_ids.device)
    return int(asked.index_fill(0, assignments.token_ids, True).sum())
