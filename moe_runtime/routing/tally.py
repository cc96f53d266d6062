"""What the metrics of routing are made of, counted per batch and summed over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.metrics import gate_confidence
from moe_runtime.routing.places import count_per_expert

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Admission
    from moe_runtime.routing.metrics import GateConfidence
    from moe_runtime.routing.probabilities import ProbabilityScore


@dataclass(frozen=True)
class RoutingTally:
    """Counts of one batch or, added, of many; ``routing_metrics`` makes figures of them.

    Attributes:
        load: Assignments that each expert was asked for, before drops and rerouting.
        num_dropped: Assignments that were dropped.
        confidence: How sure the gate was; None where its logits are not known.
        label_load: Assignments of tokens of each label to each expert, int64 ``(num_labels, num_experts)``; None
            where there are no labels.
    """

    load: tuple[int, ...]
    num_dropped: int = 0
    confidence: GateConfidence | None = None
    label_load: Tensor | None = None

    def __add__(self, other: RoutingTally) -> RoutingTally:
        """The counts of both; what only one of them knows is lost.

        Raises:
            ShapeError: If they are of different numbers of experts.
        """
        if len(self.load) != len(other.load):
            raise ShapeError(f"tally: expected another of {len(self.load)} experts, found one of {len(other.load)}")
        return RoutingTally(
            load=tuple(one + another for one, another in zip(self.load, other.load, strict=True)),
            num_dropped=self.num_dropped + other.num_dropped,
            confidence=_merged(self.confidence, other.confidence),
            label_load=_sum(self.label_load, other.label_load),
        )


def tally_routing(
    admission: Admission,
    *,
    router_logits: Tensor | None = None,
    mask: Tensor | None = None,
    score: ProbabilityScore = "softmax",
    labels: Tensor | None = None,
) -> RoutingTally:
    """The counts of one batch.

    Args:
        admission: What the policy asked for, after capacity was enforced.
        router_logits: ``(num_tokens, num_experts)``, for the gate's confidence.
        mask: Bool ``(num_tokens,)``, the one that the policy got; rows that are False are padding.
        score: How logits become probabilities.
        labels: Integers of at least 0, ``(num_tokens,)``: what the experts may specialise in.

    Raises:
        ShapeError: If there is not one label per token.
        InvalidRequestError: If a label is negative.
    """
    asked, num_experts = admission.asked_expert_ids, admission.assignments.num_experts
    return RoutingTally(
        load=count_per_expert(asked, num_experts=num_experts),
        num_dropped=int((~admission.admitted).sum()),
        confidence=None if router_logits is None else gate_confidence(router_logits, mask=mask, score=score),
        label_load=None if labels is None else _label_load(admission, labels),
    )


def _label_load(admission: Admission, labels: Tensor) -> Tensor:
    assignments = admission.assignments
    if labels.shape != (assignments.num_tokens,):
        raise ShapeError(
            f"labels: expected one per token, shape ({assignments.num_tokens},), found {tuple(labels.shape)}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise InvalidRequestError(f"labels: expected integers of at least 0, found {int(labels.min())}")
    num_labels = int(labels.max()) + 1 if len(labels) else 0
    cells = labels[assignments.token_ids] * assignments.num_experts + admission.asked_expert_ids
    return (
        torch.bincount(cells, minlength=num_labels * assignments.num_experts)
        .view(num_labels, assignments.num_experts)
        .cpu()
    )


def _merged(one: GateConfidence | None, other: GateConfidence | None) -> GateConfidence | None:
    return None if one is None or other is None else one + other


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return None
    # A batch knows the labels that occur in it.
    num_labels = max(len(one), len(other))
    return F.pad(one, (0, 0, 0, num_labels - len(one))) + F.pad(other, (0, 0, 0, num_labels - len(other)))
