"""Oracles of the policies in which each token takes its experts of the highest score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.config.policies import DensePolicyConfig, SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, sigmoid, softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.config.policies import GroupsConfig


class TopKOracle(ChoiceOracle[DensePolicyConfig | SwitchPolicyConfig | TopKPolicyConfig]):
    """Oracle of ``dense``, ``switch`` and ``top_k``."""

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        config = self.config
        if isinstance(config, SwitchPolicyConfig):
            return WeightRule(normalize="none")
        if isinstance(config, DensePolicyConfig):
            return WeightRule(normalize=config.normalize)
        return WeightRule(config.normalize, norm_p=config.norm_p, scaling_factor=config.scaling_factor)

    def request(self) -> list[RoutedPair]:
        """Each token's best experts."""
        pairs = []
        for token in self.valid_tokens():
            preferences = self.preferences(token)
            best_first = sorted(range(self.num_experts), key=lambda expert: -preferences[expert])
            held = best_first[: self.choices_of(token, self._most)]
            for rank, expert in enumerate(held):
                score = self.score(token, expert, held)
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=score))
        return pairs

    def preferences(self, token: int) -> list[float]:
        """Scores that a token's experts are selected by: with the bias, -inf in groups that are left out."""
        config, scores = self.config, self._scores(token)
        if not isinstance(config, TopKPolicyConfig):
            return scores
        if config.expert_bias and self.inputs.expert_bias is not None:
            scores = [score + bias for score, bias in zip(scores, self.inputs.expert_bias, strict=True)]
        if config.groups is None:
            return scores
        return self._only_best_groups(scores, config.groups, default="top2_sum" if config.expert_bias else "max")

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Score that an expert's weight is made of."""
        if self._score == "softmax_after_topk":
            return softmax([self.logits[token][each] for each in held])[list(held).index(expert)]
        return self._scores(token)[expert]

    def _scores(self, token: int) -> list[float]:
        row = self.logits[token]
        if self._score == "softmax_after_topk":
            return row
        return [sigmoid(logit) for logit in row] if self._score == "sigmoid" else softmax(row)

    def _only_best_groups(self, scores: list[float], groups: GroupsConfig, *, default: str) -> list[float]:
        size = self.num_experts // groups.count
        members = [range(group * size, (group + 1) * size) for group in range(groups.count)]
        best_first = [sorted((scores[expert] for expert in group), reverse=True) for group in members]
        rule = groups.score or default
        worth = [sum(best[:2]) if rule == "top2_sum" else best[0] for best in best_first]
        by_worth = sorted(range(groups.count), key=lambda group: -worth[group])
        kept = {expert for group in by_worth[: groups.keep] for expert in members[group]}
        return [score if expert in kept else -math.inf for expert, score in enumerate(scores)]

    @property
    def _most(self) -> int:
        if isinstance(self.config, DensePolicyConfig):
            return self.num_experts
        return 1 if isinstance(self.config, SwitchPolicyConfig) else self.config.k

    @property
    def _score(self) -> str:
        return self.config.score if isinstance(self.config, TopKPolicyConfig) else "softmax"
