"""Where the rows of a batch may go when their expert fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.moved import next_best_experts
from moe_runtime.routing.shared import without_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.routing.assignments import DispatchPlan


class Rerouting:
    """Finds other experts for rows of one batch, and remembers what each token has had.

    A token never goes to an expert that it asked for, holds, or was moved to before, and never to a shared one. Where
    the layer has a capacity, an expert takes no more than that: its planned rows and those that were moved to it,
    whether they are served or not.

    Args:
        plan: The batch's, as it was dispatched.
    """

    def __init__(self, plan: DispatchPlan) -> None:
        admission = without_shared(plan.admission)
        assignments = self._assignments = admission.assignments
        self._free = torch.ones((assignments.num_tokens, assignments.num_experts), dtype=torch.bool)
        self._free[assignments.token_ids, assignments.expert_ids] = False
        self._free[assignments.token_ids, admission.asked_expert_ids] = False
        capacity = plan.num_planned if admission.capacity is None else admission.capacity
        self._room = [capacity - num_rows for num_rows in plan.rows_per_expert]
        self._is_dropless = admission.capacity is None

    def choose(self, token_ids: Sequence[int], *, usable: Sequence[bool], limit: int) -> list[int | None]:
        """An expert for each of some tokens, one after the other; None where there is none.

        Args:
            token_ids: The tokens, each once.
            usable: Whether an expert can be reached, per expert that the policy routes to.
            limit: Experts that each may look at, best first; it takes the first that has room.
        """
        tokens = torch.tensor(token_ids)
        allowed = self._free[tokens] & torch.tensor(usable)
        chosen = []
        for candidates in next_best_experts(self._assignments, tokens, allowed=allowed, limit=limit):
            expert_id = next((each for each in candidates if self._is_dropless or self._room[each] > 0), None)
            if expert_id is not None:
                self._room[expert_id] -= 1
            chosen.append(expert_id)
        moved = torch.tensor([expert_id is not None for expert_id in chosen])
        self._free[tokens[moved], torch.tensor([each for each in chosen if each is not None], dtype=torch.int64)] = (
            False
        )
        return chosen
