"""From a policy's answer to how it did: loads, drops, accuracy, and its distance from all experts together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.demos.routers.result import PolicyResult
from moe_runtime.errors import InternalError
from moe_runtime.wire.messages import SERVED

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.demos.routers.serving import Answer
    from moe_runtime.wire.messages import Report


@dataclass(frozen=True)
class Truth:
    """What answers are held against.

    Attributes:
        digits: What the images show, int64 ``(num_images,)``.
        expert_logits: What every expert makes of every image, ``(num_experts, num_images, 10)``.
    """

    digits: Tensor
    expert_logits: Tensor


@dataclass(frozen=True)
class Routing:
    """A report's assignments.

    Attributes:
        token_ids: Image of each, int64 ``(num_assignments,)``.
        expert_ids: Expert of each, same shape.
        weights: Applied weights, float32, same shape.
        served: Whether the expert answered, bool, same shape.
    """

    token_ids: Tensor
    expert_ids: Tensor
    weights: Tensor
    served: Tensor

    @classmethod
    def of(cls, report: Report) -> Routing:
        """The routing that a report tells.

        Raises:
            InternalError: If it tells none.
        """
        arrays = (report.token_ids, report.expert_ids, report.expert_weights, report.outcomes)
        if any(array is None for array in arrays):
            raise InternalError(f"request {report.request_id}: expected its routing in the report, found none")
        token_ids, expert_ids, weights, outcomes = (torch.tensor(array) for array in arrays)
        return cls(token_ids, expert_ids, weights, outcomes == SERVED)


def summarise(answer: Answer, *, dense: Tensor, truth: Truth) -> PolicyResult:
    """How a policy did.

    Args:
        answer: Its answer to one request of all images.
        dense: The logits of all experts together, ``(num_images, 10)``.
        truth: What it is held against.
    """
    outputs, report = answer.result.outputs, answer.result.report
    routing = Routing.of(report)
    has_answer = torch.zeros(len(outputs), dtype=torch.bool).index_fill(0, routing.token_ids[routing.served], True)
    found = outputs.argmax(dim=1)
    expected = combined(routing, truth.expert_logits)
    return PolicyResult(
        name=answer.policy.name,
        loads=tuple(torch.bincount(routing.expert_ids, minlength=len(truth.expert_logits)).tolist()),
        num_dropped=report.num_dropped_capacity + report.num_dropped_failure,
        num_unserved=int((~has_answer).sum()),
        agreement=_share(has_answer & (found == dense.argmax(dim=1))),
        mean_difference=float((outputs - dense).abs().mean()),
        accuracy=_share(has_answer & (found == truth.digits)),
        max_difference=float((outputs - expected).abs().max()),
        rolling_s=answer.rolling_s,
    )


def combined(routing: Routing, expert_logits: Tensor) -> Tensor:
    """What the reported experts and weights come to, ``(num_images, 10)``."""
    weights = torch.where(routing.served, routing.weights, 0.0)
    rows = weights[:, None] * expert_logits[routing.expert_ids, routing.token_ids]
    return torch.zeros(expert_logits.shape[1:]).index_add(0, routing.token_ids, rows)


def _share(right: Tensor) -> float:
    return float(right.double().mean())
