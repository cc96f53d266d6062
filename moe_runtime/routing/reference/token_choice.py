"""Oracles of the policies in which each token takes its experts of the highest score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.policies import DensePolicyConfig, SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, sigmoid, softmax

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        """Scores that a token's experts are selected by."""
        row = self.logits[token]
        if self._score == "softmax_after_topk":
            return row
        return [sigmoid(logit) for logit in row] if self._score == "sigmoid" else softmax(row)

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Score that an expert's weight is made of."""
        if self._score == "softmax_after_topk":
            return softmax([self.logits[token][each] for each in held])[list(held).index(expert)]
        return self.preferences(token)[expert]

    @property
    def _most(self) -> int:
        if isinstance(self.config, DensePolicyConfig):
            return self.num_experts
        return 1 if isinstance(self.config, SwitchPolicyConfig) else self.config.k

    @property
    def _score(self) -> str:
        return self.config.score if isinstance(self.config, TopKPolicyConfig) else "softmax"
