"""Oracles of the policies in which tokens of a batch compete for experts."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

from moe_runtime.config.policies import (
    ExpertChoicePolicyConfig,
    GlobalAssignmentPolicyConfig,
    SinkhornPolicyConfig,
)
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, sigmoid, softmax


class ExpertChoiceOracle(ChoiceOracle[ExpertChoicePolicyConfig]):
    """Oracle of ``expert_choice``."""

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        return WeightRule(normalize=self.config.normalize)

    def request(self) -> list[RoutedPair]:
        """Each expert's best tokens; a token's ranks follow its own scores."""
        valid = self.valid_tokens()
        scores = {token: self._scores(token) for token in valid}
        wanted = math.ceil(Fraction(str(self.config.capacity_factor)) * len(valid) / self.num_experts)
        experts_of: dict[int, list[int]] = {token: [] for token in valid}
        for expert in range(self.num_experts):
            best_first = sorted(valid, key=lambda token: -scores[token][expert])
            for token in best_first[:wanted]:
                experts_of[token].append(expert)
        pairs = []
        for token, experts in experts_of.items():
            for rank, expert in enumerate(sorted(experts, key=lambda expert: -scores[token][expert])):
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=scores[token][expert]))
        return pairs

    def _scores(self, token: int) -> list[float]:
        row = self.logits[token]
        return softmax(row) if self.config.score == "softmax" else [sigmoid(logit) for logit in row]


class GlobalAssignmentOracle(ChoiceOracle[GlobalAssignmentPolicyConfig]):
    """Oracle of ``global_assignment``, whatever the solver: the highest total, by trying all loads of the experts."""

    def request(self) -> list[RoutedPair]:
        """One expert per token: the balanced ones, or the best in evaluation."""
        tokens = [token for token in self.valid_tokens() if self.choices_of(token, 1)]
        if self.inputs.training or self.config.evaluation == "as_in_training":
            experts = best_balance([self.logits[token] for token in tokens], self.num_experts)
        else:
            experts = [self.logits[token].index(max(self.logits[token])) for token in tokens]
        return [
            RoutedPair(token, 0, requested=expert, expert=expert, score=sigmoid(self.logits[token][expert]))
            for token, expert in zip(tokens, experts, strict=True)
        ]


def best_balance(scores: list[list[float]], num_experts: int) -> list[int]:
    """The expert of each token at the highest total score, where loads differ by one at most.

    Exponential in the number of experts: for a handful of each.
    """
    share, remainder = divmod(len(scores), num_experts)

    @cache
    def best_from(token: int, loads: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        if token == len(scores):
            return 0.0, ()
        candidates = []
        for expert, load in enumerate(loads):
            has_seat = load < share or (load == share and sum(each > share for each in loads) < remainder)
            if has_seat:
                after = (*loads[:expert], load + 1, *loads[expert + 1 :])
                total, rest = best_from(token + 1, after)
                candidates.append((total + scores[token][expert], (expert, *rest)))
        return max(candidates)

    return list(best_from(0, (0,) * num_experts)[1])


class SinkhornOracle(ChoiceOracle[SinkhornPolicyConfig]):
    """Oracle of ``sinkhorn``."""

    def request(self) -> list[RoutedPair]:
        """Each token's largest entries of the scaled matrix, or of the logits in evaluation."""
        prices = self._prices()
        pairs = []
        for token in self.valid_tokens():
            row = self.logits[token]
            scores = [sigmoid(logit) for logit in row] if self.config.k == 1 else softmax(row)
            preferences = [gap + price for gap, price in zip(_gaps(row), prices, strict=True)]
            best_first = sorted(range(self.num_experts), key=lambda expert: -preferences[expert])
            for rank, expert in enumerate(best_first[: self.choices_of(token, self.config.k)]):
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=scores[expert]))
        return pairs

    def _prices(self) -> list[float]:
        """Logarithms of the columns' factors, found with logarithms throughout."""
        rows = [_gaps(self.logits[token]) for token in self.valid_tokens()]
        prices = [0.0] * self.num_experts
        if len(rows) < 2 or not (self.inputs.training or self.config.evaluation == "as_in_training"):
            return prices
        mean = math.log(len(rows) / self.num_experts)
        for _ in range(self.config.max_iterations):
            scales = [-_log_sum([gap + price for gap, price in zip(row, prices, strict=True)]) for row in rows]
            sums = [
                _log_sum([row[expert] + scale for row, scale in zip(rows, scales, strict=True)])
                for expert in range(self.num_experts)
            ]
            shares = [math.exp(price + each - mean) for price, each in zip(prices, sums, strict=True)]
            if max(abs(share - 1.0) for share in shares) < self.config.tolerance:
                break
            prices = [mean - each for each in sums]
        return prices


def _gaps(row: list[float]) -> list[float]:
    return [max(logit - max(row), -300.0) for logit in row]


def _log_sum(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))
