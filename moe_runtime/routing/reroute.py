"""Rerouting: assignments that found their expert full try the token's next-best experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.moved import move_assignments, preferences_of
from moe_runtime.routing.places import positions_in_group

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission, Assignments


def reroute(admission: Admission, *, order: Tensor | None, capacity: int, max_reroutes: int) -> Admission:
    """The admission, with overflowed assignments placed at other experts where those have room.

    Overflowed assignments go one after another, in the order of the first admissions. Each tries the experts
    that its token did not ask for and does not hold yet, the preferred first, ``max_reroutes`` of them, and takes
    the first with a free place. Its score is the token's own score there.

    The result is that of this loop, but it is found in rounds of tensor operations: all assignments choose as
    if nobody before them filled an expert, and those before the first that is wrong about it are settled.
    Every round but the last fills an expert, so there are at most ``num_experts + 1``.

    Args:
        admission: After first admissions, with nothing rerouted.
        order: The order of admission; as the assignments stand when None.
        capacity: Places per expert.
        max_reroutes: Experts that one assignment tries.

    Raises:
        ConfigError: If the policy has no scores for unselected experts.
    """
    assignments = admission.assignments
    overflowed = (~admission.admitted if order is None else ~admission.admitted[order]).nonzero().squeeze(1)
    if order is not None:
        overflowed = order[overflowed]
    load = torch.bincount(assignments.expert_ids[admission.admitted], minlength=assignments.num_experts)
    claims = _claims(assignments, overflowed, max_reroutes=max_reroutes)
    places = _settle(claims, capacity - load, max_reroutes=max_reroutes)
    return move_assignments(admission, overflowed[places.claim_ids], places.expert_ids)


@dataclass(frozen=True)
class _Claims:
    """Overflowed assignments in the order of their turn, and where each may go.

    Attributes:
        rows: Row of ``experts`` that each claim reads, int64 ``(num_claims,)``; one row per token.
        turns: How many claims of the same token come before, int64 ``(num_claims,)``.
        experts: Unselected experts of each token, best first, int64 ``(num_rows, width)``.
        allowed: Whether the entry of ``experts`` is one, bool, same shape.
    """

    rows: Tensor
    turns: Tensor
    experts: Tensor
    allowed: Tensor


@dataclass(frozen=True)
class _Places:
    """Claims that found a place, and at which expert; both int64 ``(num_placed,)``."""

    claim_ids: Tensor
    expert_ids: Tensor


def _claims(assignments: Assignments, overflowed: Tensor, *, max_reroutes: int) -> _Claims:
    tokens, rows = torch.unique(assignments.token_ids[overflowed], return_inverse=True)
    per_token = torch.bincount(rows)
    turns = positions_in_group(rows, order=None, sizes=per_token)
    selected = torch.zeros((assignments.num_tokens, assignments.num_experts), dtype=torch.bool, device=tokens.device)
    selected[assignments.token_ids, assignments.expert_ids] = True
    preferences = preferences_of(assignments)[tokens]
    # A token whose earlier claims were met skips what it got there, so a later claim may look further.
    width = min(max_reroutes + int(per_token.max()) - 1, assignments.num_experts)
    scores, experts = torch.topk(preferences.masked_fill(selected[tokens], -torch.inf), width, dim=-1)
    return _Claims(rows=rows, turns=turns, experts=experts, allowed=scores > -torch.inf)


def _settle(claims: _Claims, free: Tensor, *, max_reroutes: int) -> _Places:
    num_claims, num_rows = claims.rows.shape[0], claims.experts.shape[0]
    columns = torch.arange(claims.experts.shape[1], device=free.device)
    untaken = claims.allowed.clone()
    held = free.new_zeros(num_rows)
    settled = free.new_zeros(num_rows)
    claim_ids, expert_ids = [], []
    first = 0
    while first < num_claims:
        rows = claims.rows[first:]
        turns = claims.turns[first:] - settled[rows]
        available = untaken & (free[claims.experts] > 0)
        limits = max_reroutes + held[rows] + turns
        # The n-th open claim of a token takes its n-th available expert, the earlier ones the better.
        hits = available[rows] & (available.cumsum(1)[rows] == turns[:, None] + 1) & (columns < limits[:, None])
        takers = hits.any(1).nonzero().squeeze(1)
        taken = hits[takers].int().argmax(1)
        wanted = claims.experts[rows[takers], taken]
        demand = torch.bincount(wanted, minlength=free.shape[0])
        too_late = takers[positions_in_group(wanted, order=None, sizes=demand) >= free[wanted]]
        end = int(too_late[0]) if too_late.shape[0] else num_claims - first
        winners = takers < end
        claim_ids.append(takers[winners] + first)
        expert_ids.append(wanted[winners])
        free = free - torch.bincount(wanted[winners], minlength=free.shape[0])
        untaken[rows[takers[winners]], taken[winners]] = False
        held = held + torch.bincount(rows[takers[winners]], minlength=num_rows)
        settled = settled + torch.bincount(rows[:end], minlength=num_rows)
        first += end
    return _Places(claim_ids=torch.cat(claim_ids), expert_ids=torch.cat(expert_ids))
