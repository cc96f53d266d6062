"""A batch between its dispatch and its result."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.moved import move_rows
from moe_runtime.service.dispatch import as_rows
from moe_runtime.service.failures import BatchFailures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.rerouting import Rerouting
    from moe_runtime.service.routing_table import RoutingTable
    from moe_runtime.service.row_buffers import ExpertRows
    from moe_runtime.service.stats import LayerStats


@dataclass(slots=True, eq=False)
class Flight:
    """A batch whose experts are at work.

    Attributes:
        batch_id: Names it in its result.
        batch: Its tokens.
        layer: Its layer.
        plan: As it was dispatched.
        table: The version that it uses.
        stats: The layer's counters.
        expert_rows: What came back.
        gate_s: Seconds that it took to be routed.
        dispatched_at: Clock time of the dispatch.
        deadline: Clock time when whatever is open is given up.
        num_open_rows: Planned rows that have neither come back nor been given up.
        failures: What went wrong; None if nothing did.
        rerouting: Where its rows may go; None until one has to.
    """

    batch_id: int
    batch: Batch
    layer: RoutedLayer
    plan: DispatchPlan
    table: RoutingTable
    stats: LayerStats
    expert_rows: ExpertRows
    gate_s: float
    dispatched_at: float
    deadline: float
    num_open_rows: int
    failures: BatchFailures | None = None
    rerouting: Rerouting | None = None
    _token_ids: list[int] = field(default_factory=list)

    @property
    def awaited_until(self) -> float:
        """Clock time after which nobody waits for its rows."""
        return min(self.deadline, self.batch.awaited_until)

    def log(self) -> BatchFailures:
        """Where what goes wrong is written down."""
        if self.failures is None:
            self.failures = BatchFailures()
        return self.failures

    def give_up(self, rows: Sequence[int]) -> None:
        """Leave planned rows to the residual."""
        self.log().unserved.extend(rows)
        self.num_open_rows -= len(rows)

    def has_failed(self, request: int | None) -> bool:
        """Whether a request of the batch, by its place, is answered with an error already."""
        return self.failures is not None and request in self.failures.errors

    def token_ids(self, rows: Sequence[int]) -> list[int]:
        """The batch's row that each planned row was made from."""
        if not self._token_ids:
            self._token_ids = self.plan.token_ids.tolist()
        return [self._token_ids[row] for row in rows]

    def request_name(self, request: int) -> str:
        """A request of the batch, by its place, in words."""
        request_ids = self.batch.request_ids
        return f"request {request_ids[request]}" if request < len(request_ids) else f"batch {self.batch_id}"

    def by_request(self, rows: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        """Planned rows of one expert by the request that they belong to, as its place in the batch."""
        starts = self.batch.row_starts
        owned = [
            (bisect_right(starts, token_id) - 1, row) for token_id, row in zip(self.token_ids(rows), rows, strict=True)
        ]
        for request, group in groupby(sorted(owned), key=lambda each: each[0]):
            yield request, as_rows([row for _, row in group])

    def present_plan(self) -> DispatchPlan:
        """The plan with the rows moved that were, and the weights that follow."""
        if self.failures is None or not self.failures.moves:
            return self.plan
        moves = self.failures.moves
        return move_rows(self.plan, torch.tensor([*moves.keys()]), torch.tensor([*moves.values()]))

    def num_reachable(self) -> int:
        """Experts that rows may be moved to, as far as the table knows: those that are routed to and have a replica."""
        layer, table = self.layer, self.table
        shared = range(layer.num_routed, layer.num_experts)
        return table.num_reachable(layer.name) - sum(bool(table.usable(layer.name, expert_id)) for expert_id in shared)

    def served(self) -> Tensor | None:
        """Which planned rows came back, bool ``(num_planned,)``; None is all."""
        if self.failures is None or not self.failures.unserved:
            return None
        return ~self.mask_of(self.failures.unserved)

    def mask_of(self, rows: Sequence[int]) -> Tensor:
        """These planned rows, as bool ``(num_planned,)``."""
        mask = torch.zeros(self.plan.num_planned, dtype=torch.bool)
        mask[torch.tensor(rows, dtype=torch.int64)] = True
        return mask
