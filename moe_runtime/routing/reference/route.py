"""The slow oracle: one token, one assignment and one number at a time, in float64.

It shares no code with the fast path and defines what that path must compute, for every policy and option, with
experts that fail included. Tests compare against it; nothing in the runtime calls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.config.models import CapacityConfig, ResidualRule, WeightOn
from moe_runtime.config.policies import PolicyConfig, TopKPolicyConfig
from moe_runtime.routing.reference.choices import RoutedPair
from moe_runtime.routing.reference.draws import splitmix64
from moe_runtime.routing.reference.oracles import oracle_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_runtime.routing.reference.choices import ChoiceOracle, RoutingInputs


@dataclass(frozen=True)
class RoutingRules:
    """Everything that decides what becomes of a token, apart from the logits."""

    policy: PolicyConfig = field(default_factory=TopKPolicyConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    residual: ResidualRule = "none"
    weight_on: WeightOn = "output"
    reroutes_failures: bool = False
    num_shared: int = 0


def route_reference(inputs: RoutingInputs, rules: RoutingRules) -> list[RoutedPair]:
    """Every assignment of a batch with its fate and weight, in k-major order; those of shared experts last."""
    oracle = oracle_of(rules.policy, inputs)
    pairs = sorted(oracle.request(), key=lambda pair: (pair.rank, pair.token))
    _admit(pairs, oracle, inputs, rules.capacity)
    if rules.reroutes_failures:
        _reroute_failed(pairs, oracle, inputs, rules.capacity)
    for pair in pairs:
        if pair.admitted:
            failed = (pair.token, pair.expert) in inputs.failed
            pair.outcome = "dropped_failure" if failed else "served"
    _weigh(pairs, oracle)
    return pairs + _shared_pairs(pairs, oracle, inputs, rules.num_shared)


def forward_reference(
    tokens: Tensor, inputs: RoutingInputs, rules: RoutingRules, *, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The layer's output, ``(num_tokens, *out_shape)`` in float64.

    Args:
        tokens: The batch, ``(num_tokens, *item_shape)``.
        inputs: Its logits and wishes.
        rules: The layer's rules.
        experts: One function per expert, the shared ones last, from one float64 row ``item_shape`` to one row
            ``out_shape``.
    """
    pairs = route_reference(inputs, rules)
    rows = []
    for token, row in enumerate(tokens.double()):
        total, num_served, sum_of_weights = torch.zeros_like(experts[0](row)), 0, 0.0
        for pair in pairs:
            if pair.token != token or pair.outcome != "served":
                continue
            num_served += 1
            sum_of_weights += 0.0 if pair.shared else pair.weight
            if rules.weight_on == "input":
                total = total + experts[pair.expert](row * pair.weight)
            else:
                total = total + pair.weight * experts[pair.expert](row)
        if rules.residual == "add":
            total = row + total
        elif rules.residual == "blend":
            total = total + (1.0 - sum_of_weights) * row
        elif rules.residual == "passthrough" and num_served == 0:
            total = row
        rows.append(total)
    return torch.stack(rows)


def _admit(pairs: list[RoutedPair], oracle: ChoiceOracle[Any], inputs: RoutingInputs, rule: CapacityConfig) -> None:
    places = [_capacity(pairs, oracle.num_experts, rule)] * oracle.num_experts
    overflowed = []
    for pair in _in_drop_order(pairs, inputs, rule):
        if places[pair.expert] > 0:
            places[pair.expert] -= 1
            pair.admitted = True
        else:
            overflowed.append(pair)
    if rule.overflow == "reroute":
        for pair in overflowed:
            _reroute(pair, pairs, places, oracle.preferences(pair.token), rule)
        _rescore(pairs, oracle)


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
        best = {token: max(pair.score for pair in pairs if pair.token == token) for token in {p.token for p in pairs}}
        return sorted(pairs, key=lambda pair: (pair.rank, -best[pair.token]))

    def draw(pair: RoutedPair) -> int:
        seed = pair.token if inputs.row_seeds is None else inputs.row_seeds[pair.token]
        return splitmix64(seed, pair.rank)

    return sorted(pairs, key=draw)


def _reroute(
    pair: RoutedPair, pairs: list[RoutedPair], places: list[int], scores: list[float], rule: CapacityConfig
) -> None:
    mates = [other for other in pairs if other.token == pair.token]
    taken = {other.requested for other in mates} | {other.expert for other in mates}
    candidates = [expert for expert in range(len(scores)) if expert not in taken and scores[expert] > -math.inf]
    candidates.sort(key=lambda expert: -scores[expert])
    for expert in candidates[: rule.max_reroutes]:
        if places[expert] > 0:
            places[expert] -= 1
            pair.expert, pair.admitted = expert, True
            return


def _reroute_failed(
    pairs: list[RoutedPair], oracle: ChoiceOracle[Any], inputs: RoutingInputs, rule: CapacityConfig
) -> None:
    """Pairs whose expert fails take another one, by expert; then those that fail again. No place becomes free."""
    places = [_capacity(pairs, oracle.num_experts, rule)] * oracle.num_experts
    had = {(pair.token, pair.requested) for pair in pairs} | {(pair.token, pair.expert) for pair in pairs}
    for pair in pairs:
        places[pair.expert] -= pair.admitted
    turn = [pair for pair in pairs if pair.admitted and (pair.token, pair.expert) in inputs.failed]
    turn.sort(key=lambda pair: pair.token)
    for num_moves in range(rule.max_reroutes):
        turn.sort(key=lambda pair: pair.expert)
        for pair in turn:
            scores = oracle.preferences(pair.token)
            candidates = [
                expert
                for expert in range(oracle.num_experts)
                if (pair.token, expert) not in had and scores[expert] > -math.inf
            ]
            candidates.sort(key=lambda expert: -scores[expert])
            for expert in candidates[: rule.max_reroutes - num_moves]:
                if places[expert] > 0:
                    pair.expert, places[expert] = expert, places[expert] - 1
                    had.add((pair.token, expert))
                    break
        turn = [pair for pair in turn if (pair.token, pair.expert) in inputs.failed]
    _rescore(pairs, oracle)


def _rescore(pairs: list[RoutedPair], oracle: ChoiceOracle[Any]) -> None:
    """Scores over the sets after rerouting, as if the experts that were full had been masked."""
    for token in {pair.token for pair in pairs if pair.rerouted}:
        mates = [pair for pair in pairs if pair.token == token]
        held = [pair.expert for pair in mates]
        for pair in mates:
            pair.score = oracle.score(token, pair.expert, held)


def _weigh(pairs: list[RoutedPair], oracle: ChoiceOracle[Any]) -> None:
    rule = oracle.rule
    for pair in pairs:
        if pair.outcome != "served":
            continue
        norm = 1.0
        if rule.normalize != "none":
            mates = [other for other in pairs if other.token == pair.token]
            counted = [other.score for other in mates if rule.normalize == "before_drop" or other.outcome == "served"]
            if rule.normalize == "before_drop":
                left_out = set(oracle.left_out(pair.token)) - {other.expert for other in mates}
                counted += [oracle.score(pair.token, expert, sorted(left_out)) for expert in left_out]
            norm = sum(score**rule.norm_p for score in counted) ** (1.0 / rule.norm_p)
        pair.weight = rule.scaling_factor * pair.score / norm


def _shared_pairs(
    pairs: list[RoutedPair], oracle: ChoiceOracle[Any], inputs: RoutingInputs, num_shared: int
) -> list[RoutedPair]:
    """What shared experts are asked for: every token that is not padding, behind the policy's choices."""
    num_choices = max((pair.rank + 1 for pair in pairs), default=0)
    shared = []
    for place in range(num_shared):
        for token in oracle.valid_tokens():
            expert = oracle.num_experts + place
            score = 1.0 if inputs.shared_weights is None else inputs.shared_weights[token][place]
            pair = RoutedPair(token, num_choices + place, expert, expert, score, admitted=True, shared=True)
            pair.outcome = "dropped_failure" if (token, expert) in inputs.failed else "served"
            pair.weight = score if pair.outcome == "served" else 0.0
            shared.append(pair)
    return shared
