"""All auxiliary losses of a layer at once, by the coefficients of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from moe_runtime.errors import InvalidRequestError
from moe_runtime.routing.losses import (
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    mutual_information_loss,
    sequence_balance_loss,
    z_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from moe_runtime.config.balance import LossesConfig
    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.gates import NoisyLogits
    from moe_runtime.routing.probabilities import ProbabilityScore

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the losses of a batch are made of; what no loss of the layer needs may be left out.

    Attributes:
        router_logits: ``(num_tokens, num_experts)``, the ones that the policy got.
        assignments: What the policy asked for.
        mask: Bool ``(num_tokens,)``, the one that the policy got; rows that are False are padding.
        score: How logits become probabilities; ``sigmoid`` for a policy of that score.
        sequence_ids: Integers ``(num_tokens,)``, the sequence of each token; for ``sequence``.
        tasks: Integers ``(num_tokens,)``, the task of each token; for ``mutual_information``.
        noisy_logits: What a noisy gate scored; for ``load``.
    """

    router_logits: Tensor
    assignments: Assignments
    mask: Tensor | None = None
    score: ProbabilityScore = "softmax"
    sequence_ids: Tensor | None = None
    tasks: Tensor | None = None
    noisy_logits: NoisyLogits | None = None


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The auxiliary losses of a batch.

    Attributes:
        total: The sum of coefficient times loss, a scalar that is at least float32; 0 where no coefficient is set.
        parts: Each loss that counts, before its coefficient, by its name in ``LossesConfig``.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


def auxiliary_loss(losses: LossesConfig, inputs: LossInputs) -> AuxiliaryLoss:
    """The weighted sum of the losses whose coefficient is not 0; the others are not computed.

    Args:
        losses: The coefficients.
        inputs: What the losses are made of.

    Raises:
        InvalidRequestError: If a loss needs something that is missing.
        ShapeError: If a tensor has another shape than the loss needs.
    """
    coefficients: dict[str, float] = {name: value for name, value in losses.model_dump().items() if value}
    parts = {name: _LOSSES[name](inputs) for name in coefficients}
    logits = inputs.router_logits
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for name, part in parts.items():
        total = total + coefficients[name] * part
    return AuxiliaryLoss(total=total, parts=parts)


def _load_balancing(inputs: LossInputs) -> Tensor:
    return load_balancing_loss(inputs.router_logits, inputs.assignments, mask=inputs.mask, score=inputs.score)


def _importance(inputs: LossInputs) -> Tensor:
    return importance_loss(inputs.assignments)


def _load(inputs: LossInputs) -> Tensor:
    logits = _needed(inputs.noisy_logits, loss="load", what="noisy_logits, which a gate of kind `noisy` gives")
    ranks = inputs.assignments.ranks
    if not len(ranks):
        return logits.clean.sum() * 0.0
    return load_loss(logits, k=int(ranks.max()) + 1, mask=inputs.mask)


def _z(inputs: LossInputs) -> Tensor:
    return z_loss(inputs.router_logits, mask=inputs.mask)


def _sequence(inputs: LossInputs) -> Tensor:
    return sequence_balance_loss(
        inputs.router_logits,
        inputs.assignments,
        sequence_ids=_needed(inputs.sequence_ids, loss="sequence", what="sequence_ids, the sequence of each token"),
        mask=inputs.mask,
        score=inputs.score,
    )


def _entropy(inputs: LossInputs) -> Tensor:
    return entropy_loss(inputs.router_logits, mask=inputs.mask, score=inputs.score)


def _mutual_information(inputs: LossInputs) -> Tensor:
    tasks = _needed(inputs.tasks, loss="mutual_information", what="tasks, the task of each token")
    return mutual_information_loss(inputs.router_logits, tasks, mask=inputs.mask, score=inputs.score)


def _needed(value: T | None, *, loss: str, what: str) -> T:
    if value is None:
        raise InvalidRequestError(f"losses.{loss}: expected {what}, found none; give them, or set the coefficient to 0")
    return value


_LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "load_balancing": _load_balancing,
    "importance": _importance,
    "load": _load,
    "z": _z,
    "sequence": _sequence,
    "entropy": _entropy,
    "mutual_information": _mutual_information,
}
