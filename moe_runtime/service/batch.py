"""What the engine takes and gives back: a batch of joined tokens and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.routing.policy import NO_INFO, TokenInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.routing.assignments import Assignments, DispatchPlan
    from moe_runtime.routing.combine import Combined
    from moe_runtime.service.failures import BatchFailures


@dataclass(frozen=True)
class Batch:
    """Tokens of one layer that are routed together.

    Attributes:
        layer: Name of the layer.
        tokens: ``(num_tokens, *item_shape)`` in the layer's dtype.
        gate_input: What the gate sees instead of the flattened tokens, ``(num_tokens, gate_features)``.
        info: What else the policy may know of the tokens; ``row_seeds`` also decide who is dropped at random.
        tasks: The task of each token, for a gate with one part per task, int64 ``(num_tokens,)``.
        row_starts: First row of each request that the batch was joined from, ascending from 0.
        request_ids: The ids of these requests; none where nobody gave them any.
        awaited_until: Clock time after which none of these requests waits for it any more.
        assignments: What its caller has routed it to; gate and policy are not asked then, nothing is dropped for
            capacity, and the result's outputs are the experts' rows (``rows_by_choice``) for the caller to combine.
    """

    layer: str
    tokens: Tensor
    gate_input: Tensor | None = None
    info: TokenInfo = NO_INFO
    tasks: Tensor | None = None
    row_starts: tuple[int, ...] = (0,)
    request_ids: tuple[str, ...] = ()
    awaited_until: float = math.inf
    assignments: Assignments | None = None


class StageTimes(NamedTuple):
    """Seconds that a batch spent in each stage.

    Attributes:
        gate_s: Gate, policy, capacity and plan.
        experts_s: From the dispatch to the last answer.
        combine_s: Weighted sum and residual.
    """

    gate_s: float
    experts_s: float
    combine_s: float


@dataclass(frozen=True)
class BatchResult:
    """A batch after its experts have answered, or have failed to.

    Attributes:
        batch_id: What ``submit`` returned.
        combined: What its tokens became.
        table_version: Version of the routing table that the batch used.
        times: Seconds per stage.
        failures: What went wrong on the way; None if nothing did.
        overflowed: Bool ``(num_tokens,)``: rows with NaN or an infinity that no expert answered with, because a
            weighted sum left the dtype's range; None if there is none.
    """

    batch_id: int
    combined: Combined
    table_version: int
    times: StageTimes
    failures: BatchFailures | None = None
    overflowed: Tensor | None = None

    @property
    def errors(self) -> Mapping[int, MoERuntimeError]:
        """What the requests are answered with that get no result, by their place in the batch."""
        return {} if self.failures is None else self.failures.errors

    @property
    def outputs(self) -> Tensor:
        """``(num_tokens, *out_shape)`` in the layer's dtype; of a batch that its caller routed, ``rows_by_choice``."""
        return self.combined.outputs

    @property
    def plan(self) -> DispatchPlan:
        """The plan that was combined: as dispatched, with the rows moved that went to other experts since."""
        return self.combined.plan

    @property
    def weights(self) -> Tensor:
        """Float32 ``(num_planned,)``: the weight applied; 0 where not served."""
        return self.combined.weights

    @property
    def served(self) -> Tensor:
        """Bool ``(num_planned,)``: the expert answered."""
        served = self.combined.served
        return torch.ones(self.plan.num_planned, dtype=torch.bool) if served is None else served

    def mask_of(self, rows: Collection[int]) -> Tensor:
        """These planned rows, as bool ``(num_planned,)``."""
        mask = torch.zeros(self.plan.num_planned, dtype=torch.bool)
        mask[torch.tensor([*rows], dtype=torch.int64)] = True
        return mask
