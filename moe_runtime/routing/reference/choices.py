"""What the oracle of every policy is given and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from moe_runtime.routing.assignments import WeightRule

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

ConfigT = TypeVar("ConfigT")
Outcome = Literal["served", "dropped_capacity", "dropped_failure"]


@dataclass(frozen=True)
class RoutingInputs:
    """One batch.

    Attributes:
        router_logits: ``(num_tokens, num_logits)``.
        k: Experts per token: one number, one per row, or None for the policy's own.
        mask: One truth value per row; False is padding.
        row_seeds: One per row, for whatever is drawn at random; the row's index when None.
        row_ids: Row within its request, one per row; its index when None.
        token_ids: Id of each token, for policies that route by it.
        expert_bias: Added to scores for the selection, one per expert; none when None.
        training: Whether the policy does as in training.
        failed: (token, expert) pairs that the expert does not answer.
        shared_weights: Weights of the shared experts, a list per token; 1 when None.
    """

    router_logits: Tensor
    k: int | Sequence[int] | None = None
    mask: Sequence[bool] | None = None
    row_seeds: Sequence[int] | None = None
    row_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    expert_bias: Sequence[float] | None = None
    training: bool = False
    failed: Collection[tuple[int, int]] = ()
    shared_weights: Sequence[Sequence[float]] | None = None


@dataclass
class RoutedPair:
    """One assignment and what became of it.

    Attributes:
        token: Row of the batch.
        rank: Choice, 0 for the token's first.
        requested: Expert that the token asked for.
        expert: Expert that it got, the last one if several were tried; the requested one unless it was rerouted.
        score: Un-normalised score of ``expert``.
        admitted: Has a place at ``expert``.
        outcome: How it ended.
        weight: Weight applied; 0 where it was not served.
        shared: Whether the expert is a shared one, which the policy knows nothing of.
    """

    token: int
    rank: int
    requested: int
    expert: int
    score: float
    admitted: bool = False
    outcome: Outcome = "dropped_capacity"
    weight: float = 0.0
    shared: bool = False

    @property
    def rerouted(self) -> bool:
        """Whether it got another expert than the one it asked for."""
        return self.expert != self.requested


class ChoiceOracle(ABC, Generic[ConfigT]):
    """What one policy asks for in one batch, worked out number by number.

    Args:
        config: The policy's block.
        inputs: The batch.
    """

    def __init__(self, config: ConfigT, inputs: RoutingInputs) -> None:
        self.config = config
        self.inputs = inputs
        self.logits: list[list[float]] = inputs.router_logits.double().tolist()

    @property
    def num_experts(self) -> int:
        """Experts that the policy routes to."""
        return self.inputs.router_logits.shape[1]

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        return WeightRule(normalize="none")

    @abstractmethod
    def request(self) -> list[RoutedPair]:
        """Every assignment that the batch asks for, in any order; tokens that are padding ask for none."""

    def preferences(self, token: int) -> list[float]:
        """What a token's experts are preferred by when one is full or fails; -inf where it may not go."""
        raise NotImplementedError(f"{type(self.config).__name__} has no scores for unselected experts")

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Score that an expert's weight is made of, where these are the token's experts after rerouting."""
        raise NotImplementedError(f"{type(self.config).__name__} has no scores for unselected experts")

    def left_out(self, token: int) -> list[int]:
        """Experts that chance kept a token from asking for, which a norm ``before_drop`` counts all the same."""
        return []

    def valid_tokens(self) -> list[int]:
        """Tokens that are not padding."""
        mask = self.inputs.mask
        return [token for token in range(len(self.logits)) if mask is None or mask[token]]

    def choices_of(self, token: int, most: int) -> int:
        """Experts that a token asks for, where the policy gives it so many at most."""
        k = self.inputs.k
        if k is None:
            return most
        return k if isinstance(k, int) else max(0, min(most, k[token]))


def softmax(values: Sequence[float]) -> list[float]:
    """The softmax of some numbers."""
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    """The logistic function."""
    return 1.0 / (1.0 + math.exp(-value))
