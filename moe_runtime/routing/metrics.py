"""How well a layer is routed: figures of its loads, of its gate, and of what its experts are for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.probabilities import log_probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from torch import Tensor

    from moe_runtime.routing.probabilities import ProbabilityScore
    from moe_runtime.routing.tally import RoutingTally

    #: How many assignments each expert got, ``(num_experts,)``: ``Assignments.load``, or counters of a status.
    Load: TypeAlias = Sequence[int] | Tensor


@dataclass(frozen=True)
class GateConfidence:
    """How sure a gate is of its tokens.

    Attributes:
        num_tokens: Tokens that the means are over.
        top1: Mean probability of a token's likeliest expert, 1 / num_experts to 1.
        entropy: Mean entropy of a token's probabilities over its maximum, 0 (sure) to 1 (all experts alike).
    """

    num_tokens: int
    top1: float
    entropy: float

    def __add__(self, other: GateConfidence) -> GateConfidence:
        """The means over the tokens of both."""
        num_tokens = self.num_tokens + other.num_tokens
        share = other.num_tokens / max(num_tokens, 1)
        return GateConfidence(
            num_tokens=num_tokens,
            top1=self.top1 + share * (other.top1 - self.top1),
            entropy=self.entropy + share * (other.entropy - self.entropy),
        )


@dataclass(frozen=True)
class Specialisation:
    """What the expert of an assignment tells about the label of its token.

    Attributes:
        information: Mutual information of expert and label in nats: 0, where every label uses the experts alike, to
            ``label_entropy``, where the expert gives the label away.
        label_entropy: Entropy of the labels in nats, each assignment counting once.
    """

    information: float
    label_entropy: float

    @property
    def bits(self) -> float:
        """The mutual information in bits."""
        return self.information / math.log(2)

    @property
    def share(self) -> float:
        """The share of the label's entropy that the expert resolves, 0 to 1; 0 where there is one label."""
        return self.information / self.label_entropy if self.label_entropy > 0 else 0.0


@dataclass(frozen=True)
class RoutingMetrics:
    """How well a layer is routed; each figure is the result of the function of its name.

    Attributes:
        load: Assignments that each expert was asked for.
        max_over_mean: 1 (balanced) to the number of experts.
        coefficient_of_variation: 0 (balanced) to ``sqrt(num_experts - 1)``.
        entropy: 0 (one expert has all) to 1 (balanced).
        gini: 0 (balanced) to ``1 - 1 / num_experts``.
        drop_rate: 0 to 1.
        idle_experts: Experts that were asked for nothing: a gate that has collapsed leaves most of them so.
        confidence: How sure the gate is; None where its logits were not given.
        specialisation: What experts tell about labels; None where no labels were given.
    """

    load: tuple[int, ...]
    max_over_mean: float
    coefficient_of_variation: float
    entropy: float
    gini: float
    drop_rate: float
    idle_experts: tuple[int, ...]
    confidence: GateConfidence | None
    specialisation: Specialisation | None


def routing_metrics(tally: RoutingTally) -> RoutingMetrics:
    """All figures of what was counted.

    Args:
        tally: Of one batch, the sum of many, or counters of a status: ``RoutingTally(load=..., num_dropped=...)``.

    Raises:
        InvalidRequestError: If a count is negative, there are no experts, or more was dropped than was asked for.
    """
    label_load = tally.label_load
    return RoutingMetrics(
        load=tally.load,
        max_over_mean=max_over_mean(tally.load),
        coefficient_of_variation=coefficient_of_variation(tally.load),
        entropy=load_entropy(tally.load),
        gini=gini(tally.load),
        drop_rate=drop_rate(num_dropped=tally.num_dropped, num_requested=sum(tally.load)),
        idle_experts=idle_experts(tally.load),
        confidence=tally.confidence,
        specialisation=None if label_load is None else specialisation(label_load),
    )


def max_over_mean(load: Load) -> float:
    """The largest load over the mean: 1 (balanced, or no load at all) to the number of experts.

    A batch takes as long as its busiest expert: this is how many times longer than if all were alike.
    """
    counts = _counts(load)
    total = float(counts.sum())
    return float(counts.max()) * len(counts) / total if total else 1.0


def coefficient_of_variation(load: Load) -> float:
    """Standard deviation of the loads over their mean: 0 (balanced, or no load) to ``sqrt(num_experts - 1)``."""
    counts = _counts(load)
    mean = float(counts.mean())
    return float(counts.std(correction=0)) / mean if mean else 0.0


def load_entropy(load: Load) -> float:
    """Entropy of the experts' shares over its maximum: 0 (one has all) to 1 (balanced, no load, or one expert)."""
    counts = _counts(load)
    if len(counts) == 1 or not counts.any():
        return 1.0
    return min(_entropy(counts / counts.sum()) / math.log(len(counts)), 1.0)


def gini(load: Load) -> float:
    """The Gini coefficient of the loads: 0 (balanced, or no load) to ``1 - 1 / num_experts`` (one has all).

    Half the mean absolute difference of two experts' loads, over the mean load.
    """
    counts = _counts(load).sort().values
    total, num_experts = float(counts.sum()), len(counts)
    if not total:
        return 0.0
    places = torch.arange(1, num_experts + 1, dtype=counts.dtype)
    return max((2 * float((places * counts).sum()) / total - (num_experts + 1)) / num_experts, 0.0)


def idle_experts(load: Load) -> tuple[int, ...]:
    """The experts that never fire, ascending."""
    return tuple((_counts(load) == 0).nonzero().flatten().tolist())


def drop_rate(*, num_dropped: int, num_requested: int) -> float:
    """The share of the requested assignments that were dropped, 0 to 1; 0 where nothing was requested.

    Raises:
        InvalidRequestError: If it is none of 0 to ``num_requested``.
    """
    if not 0 <= num_dropped <= num_requested:
        raise InvalidRequestError(f"num_dropped: expected 0 to {num_requested}, all requested, found {num_dropped}")
    return num_dropped / max(num_requested, 1)


def gate_confidence(
    router_logits: Tensor, *, mask: Tensor | None = None, score: ProbabilityScore = "softmax"
) -> GateConfidence:
    """How sure a gate is of the tokens of a batch.

    Args:
        router_logits: ``(num_tokens, num_experts)``.
        mask: Bool ``(num_tokens,)``; rows that are False are padding.
        score: How logits become probabilities.
    """
    logs = log_probabilities(router_logits.detach() if mask is None else router_logits.detach()[mask], score=score)
    num_tokens, num_experts = logs.shape
    if not num_tokens or not num_experts:
        return GateConfidence(num_tokens=0, top1=0.0, entropy=0.0)
    entropies = -(logs.exp() * logs).sum(dim=1)
    return GateConfidence(
        num_tokens=num_tokens,
        top1=float(logs.max(dim=1).values.exp().mean()),
        entropy=float(entropies.mean()) / math.log(num_experts) if num_experts > 1 else 0.0,
    )


def specialisation(label_load: Tensor) -> Specialisation:
    """What experts tell about labels.

    Args:
        label_load: Assignments of tokens of each label to each expert, ``(num_labels, num_experts)``.

    Raises:
        ShapeError: If it is no matrix.
        InvalidRequestError: If a count is negative.
    """
    if label_load.dim() != 2:
        raise ShapeError(f"label_load: expected shape (num_labels, num_experts), found {tuple(label_load.shape)}")
    counts = label_load.detach().to("cpu", torch.float64)
    if not bool((counts >= 0).all()):
        raise InvalidRequestError(f"label_load: expected counts of at least 0, found {float(counts.min())}")
    joint = counts / counts.sum() if counts.any() else counts
    label_entropy = _entropy(joint.sum(dim=1))
    information = label_entropy + _entropy(joint.sum(dim=0)) - _entropy(joint.flatten())
    return Specialisation(information=min(max(information, 0.0), label_entropy), label_entropy=label_entropy)


def _counts(load: Load) -> Tensor:
    counts = torch.as_tensor(load, dtype=torch.float64, device="cpu").detach()
    if counts.dim() != 1 or not len(counts) or not bool((counts >= 0).all()):
        raise InvalidRequestError(
            f"load: expected one count of at least 0 per expert, for one expert or more, found {load}"
        )
    return counts


def _entropy(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum())
