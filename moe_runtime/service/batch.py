"""What the engine takes and gives back: a batch of joined tokens and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_runtime.routing.assignments import DispatchPlan
    from moe_runtime.routing.combine import Combined


@dataclass(frozen=True)
class Batch:
    """Tokens of one layer that are routed together.

    Attributes:
        layer: Name of the layer.
        tokens: ``(num_tokens, *item_shape)`` in the layer's dtype.
        gate_input: What the gate sees instead of the flattened tokens, ``(num_tokens, gate_features)``.
        k: Experts per token, at most the layer's: one number, or int64 ``(num_tokens,)``.
        mask: Bool ``(num_tokens,)``; rows that are False are padding and are not routed.
        row_seeds: Int64 ``(num_tokens,)``; keys of whatever the routing draws at random.
        request_ids: Of the requests that it was joined from, in the order of their rows; for logs.
    """

    layer: str
    tokens: Tensor
    gate_input: Tensor | None = None
    k: Tensor | int | None = None
    mask: Tensor | None = None
    row_seeds: Tensor | None = None
    request_ids: tuple[str, ...] = ()


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
        failures: Why an expert's rows were not served, by expert id.
        overflowed: Bool ``(num_tokens,)``: rows with NaN or an infinity that no expert answered with, because a
            weighted sum left the dtype's range; None if there is none.
    """

    batch_id: int
    combined: Combined
    table_version: int
    times: StageTimes
    failures: Mapping[int, str]
    overflowed: Tensor | None = None

    @property
    def outputs(self) -> Tensor:
        """``(num_tokens, *out_shape)`` in the layer's dtype."""
        return self.combined.outputs

    @property
    def plan(self) -> DispatchPlan:
        """The plan that was dispatched."""
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
