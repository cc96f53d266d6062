"""The slow oracle: one token, one assignment and one number at a time, in float64.

It shares no code with the fast path and defines what that path must compute, for every policy and option, with
experts that fail included. Tests compare against it; nothing in the runtime calls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch

from moe_runtime.config.models import (
    CapacityConfig,
    DensePolicyConfig,
    PolicyConfig,
    ResidualRule,
    SwitchPolicyConfig,
    TopKPolicyConfig,
    WeightOn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

Outcome = Literal["served", "dropped_capacity", "dropped_failure"]


@dataclass(frozen=True)
class RoutingRules:
    """Everything that decides what becomes of a token, apart from the logits."""

    policy: PolicyConfig = field(default_factory=TopKPolicyConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    residual: ResidualRule = "none"
    weight_on: WeightOn = "output"
    reroutes_failures: bool = False


@dataclass(frozen=True)
class RoutingInputs:
    """One batch.

    Attributes:
        router_logits: ``(num_tokens, num_experts)``.
        k: Experts per token: one number, one per row, or None for the policy's own.
        mask: One truth value per row; False is padding.
        row_seeds: One per row, for ``drop: random``; the row's index when None.
        failed: (token, expert) pairs that the expert does not answer.
    """

    router_logits: Tensor
    k: int | Sequence[int] | None = None
    mask: Sequence[bool] | None = None
    row_seeds: Sequence[int] | None = None
    failed: Collection[tuple[int, int]] = ()


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
    """

    token: int
    rank: int
    requested: int
    expert: int
    score: float
    admitted: bool = False
    outcome: Outcome = "dropped_capacity"
    weight: float = 0.0

    @property
    def rerouted(self) -> bool:
        """Whether it got another expert than the one it asked for."""
        return self.expert != self.requested


def route_reference(inputs: RoutingInputs, rules: RoutingRules) -> list[RoutedPair]:
    """Every requested assignment of a batch with its fate and weight, in k-major order."""
    logits = inputs.router_logits.double().tolist()
    pairs = _request(logits, inputs, rules.policy)
    _admit(pairs, logits, inputs, rules)
    if rules.reroutes_failures:
        _reroute_failed(pairs, logits, inputs, rules)
    for pair in pairs:
        if pair.admitted:
            failed = (pair.token, pair.expert) in inputs.failed
            pair.outcome = "dropped_failure" if failed else "served"
    _weigh(pairs, rules.policy)
    return pairs


def forward_reference(
    tokens: Tensor, inputs: RoutingInputs, rules: RoutingRules, *, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The layer's output, ``(num_tokens, *out_shape)`` in float64.

    Args:
        tokens: The batch, ``(num_tokens, *item_shape)``.
        inputs: Its logits and wishes.
        rules: The layer's rules.
        experts: One function per expert, from one float64 row ``item_shape`` to one row ``out_shape``.
    """
    pairs = route_reference(inputs, rules)
    rows = []
    for token, row in enumerate(tokens.double()):
        total, num_served = torch.zeros_like(experts[0](row)), 0
        for pair in pairs:
            if pair.token != token or pair.outcome != "served":
                continue
            num_served += 1
            if rules.weight_on == "input":
                total = total + experts[pair.expert](row * pair.weight)
            else:
                total = total + pair.weight * experts[pair.expert](row)
        if rules.residual == "add":
            total = row + total
        elif rules.residual == "passthrough" and num_served == 0:
            total = row
        rows.append(total)
    return torch.stack(rows)


def _request(logits: list[list[float]], inputs: RoutingInputs, policy: PolicyConfig) -> list[RoutedPair]:
    pairs = []
    for token, row in enumerate(logits):
        if inputs.mask is not None and not inputs.mask[token]:
            continue
        scores = _scores_of(row, policy)
        best_first = sorted(range(len(row)), key=lambda expert: -scores[expert])
        requested = best_first[: _choices_of(token, len(row), inputs, policy)]
        for rank, expert in enumerate(requested):
            score = _score_in_set(expert, requested, row, policy)
            pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=score))
    return sorted(pairs, key=lambda pair: (pair.rank, pair.token))


def _choices_of(token: int, num_experts: int, inputs: RoutingInputs, policy: PolicyConfig) -> int:
    if isinstance(policy, DensePolicyConfig):
        most = num_experts
    else:
        most = 1 if isinstance(policy, SwitchPolicyConfig) else policy.k
    if inputs.k is None:
        return most
    return inputs.k if isinstance(inputs.k, int) else max(0, min(most, inputs.k[token]))


def _scores_of(row: list[float], policy: PolicyConfig) -> list[float]:
    """Scores that experts are selected by."""
    if isinstance(policy, TopKPolicyConfig) and policy.score == "sigmoid":
        return [1.0 / (1.0 + math.exp(-logit)) for logit in row]
    if isinstance(policy, TopKPolicyConfig) and policy.score == "softmax_after_topk":
        return row
    return [_softmax(logit, row) for logit in row]


def _score_in_set(expert: int, chosen: list[int], row: list[float], policy: PolicyConfig) -> float:
    """Score that an expert's weight is made of, given the token's whole set."""
    if isinstance(policy, TopKPolicyConfig) and policy.score == "softmax_after_topk":
        return _softmax(row[expert], [row[other] for other in chosen])
    return _scores_of(row, policy)[expert]


def _softmax(logit: float, logits: list[float]) -> float:
    largest = max(logits)
    return math.exp(logit - largest) / sum(math.exp(other - largest) for other in logits)


def _admit(pairs: list[RoutedPair], logits: list[list[float]], inputs: RoutingInputs, rules: RoutingRules) -> None:
    num_experts = inputs.router_logits.shape[1]
    places = [_capacity(pairs, num_experts, rules.capacity)] * num_experts
    overflowed = []
    for pair in _in_drop_order(pairs, inputs, rules.capacity):
        if places[pair.expert] > 0:
            places[pair.expert] -= 1
            pair.admitted = True
        else:
            overflowed.append(pair)
    if rules.capacity.overflow == "reroute":
        for pair in overflowed:
            _reroute(pair, pairs, places, _scores_of(logits[pair.token], rules.policy), rules.capacity)
        _rescore(pairs, logits, rules.policy)


def _capacity(pairs: list[RoutedPair], num_experts: int, rule: CapacityConfig) -> int:
    num_valid = len({pair.token for pair in pairs})
    if rule.factor is None:
        return len(pairs)
    wanted = math.ceil(Fraction(str(rule.factor)) * len(pairs) / num_experts)
    return min(max(wanted, rule.min), num_valid)


def _in_drop_order(pairs: list[RoutedPair], inputs: RoutingInputs, rule: CapacityConfig) -> list[RoutedPair]:
    if rule.drop == "position":
        return pairs
    if rule.drop == "score":
        return sorted(pairs, key=lambda pair: -pair.score)
    if rule.drop == "priority":
        best = {pair.token: pair.score for pair in pairs if pair.rank == 0}
        return sorted(pairs, key=lambda pair: (pair.rank, -best[pair.token]))

    def draw(pair: RoutedPair) -> int:
        seed = pair.token if inputs.row_seeds is None else inputs.row_seeds[pair.token]
        return _splitmix64(seed, pair.rank)

    return sorted(pairs, key=draw)


def _splitmix64(seed: int, rank: int) -> int:
    """The draw of a choice, as a signed 64-bit number (https://prng.di.unimi.it/splitmix64.c)."""
    modulus = 1 << 64
    bits = (seed + (rank + 1) * 0x9E3779B97F4A7C15) % modulus
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % modulus
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % modulus
    bits ^= bits >> 31
    return bits - modulus if bits >= modulus >> 1 else bits


def _reroute(
    pair: RoutedPair, pairs: list[RoutedPair], places: list[int], scores: list[float], rule: CapacityConfig
) -> None:
    mates = [other for other in pairs if other.token == pair.token]
    taken = {other.requested for other in mates} | {other.expert for other in mates}
    candidates = [expert for expert in range(len(scores)) if expert not in taken]
    candidates.sort(key=lambda expert: -scores[expert])
    for expert in candidates[: rule.max_reroutes]:
        if places[expert] > 0:
            places[expert] -= 1
            pair.expert, pair.admitted = expert, True
            return


def _reroute_failed(
    pairs: list[RoutedPair], logits: list[list[float]], inputs: RoutingInputs, rules: RoutingRules
) -> None:
    """Pairs whose expert fails take another one, by expert; then those that fail again. No place becomes free."""
    num_experts = inputs.router_logits.shape[1]
    places = [_capacity(pairs, num_experts, rules.capacity)] * num_experts
    had = {(pair.token, pair.requested) for pair in pairs} | {(pair.token, pair.expert) for pair in pairs}
    for pair in pairs:
        places[pair.expert] -= pair.admitted
    turn = [pair for pair in pairs if pair.admitted and (pair.token, pair.expert) in inputs.failed]
    turn.sort(key=lambda pair: pair.token)
    for num_moves in range(rules.capacity.max_reroutes):
        turn.sort(key=lambda pair: pair.expert)
        for pair in turn:
            scores = _scores_of(logits[pair.token], rules.policy)
            candidates = [expert for expert in range(num_experts) if (pair.token, expert) not in had]
            candidates.sort(key=lambda expert: -scores[expert])
            for expert in candidates[: rules.capacity.max_reroutes - num_moves]:
                if places[expert] > 0:
                    pair.expert, places[expert] = expert, places[expert] - 1
                    had.add((pair.token, expert))
                    break
        turn = [pair for pair in turn if (pair.token, pair.expert) in inputs.failed]
    _rescore(pairs, logits, rules.policy)


def _rescore(pairs: list[RoutedPair], logits: list[list[float]], policy: PolicyConfig) -> None:
    """Scores over the sets after rerouting, as if the experts that were full had been masked."""
    for token in {pair.token for pair in pairs if pair.rerouted}:
        mates = [pair for pair in pairs if pair.token == token]
        held = [pair.expert for pair in mates]
        for pair in mates:
            pair.score = _score_in_set(pair.expert, held, logits[token], policy)


def _weigh(pairs: list[RoutedPair], policy: PolicyConfig) -> None:
    normalize = "none" if isinstance(policy, SwitchPolicyConfig) else policy.normalize
    norm_p, scaling_factor = 1.0, 1.0
    if isinstance(policy, TopKPolicyConfig):
        norm_p, scaling_factor = policy.norm_p, policy.scaling_factor
    for pair in pairs:
        if pair.outcome != "served":
            continue
        norm = 1.0
        if normalize != "none":
            counted = [
                other.score
                for other in pairs
                if other.token == pair.token and (normalize == "before_drop" or other.outcome == "served")
            ]
            norm = sum(score**norm_p for score in counted) ** (1.0 / norm_p)
        pair.weight = scaling_factor * pair.score / norm
