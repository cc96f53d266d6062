"""Oracle of the policy that samples its experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.config.policies import ReinforcePolicyConfig
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, softmax
from moe_runtime.routing.reference.draws import uniform

if TYPE_CHECKING:
    from collections.abc import Sequence


class ReinforceOracle(ChoiceOracle[ReinforcePolicyConfig]):
    """Oracle of ``reinforce``."""

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        return WeightRule(normalize=self.config.normalize)

    def request(self) -> list[RoutedPair]:
        """Each token's experts in the order in which Gumbel noise puts them, or by score in evaluation."""
        pairs = []
        for token in self.valid_tokens():
            keys = self._keys(token)
            best_first = sorted(range(self.num_experts), key=lambda expert: -keys[expert])
            held = best_first[: self.choices_of(token, self.config.k)]
            for rank, expert in enumerate(held):
                score = self.score(token, expert, held)
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=score))
        return pairs

    def preferences(self, token: int) -> list[float]:
        """Probabilities, sampled or not."""
        return softmax(self.logits[token])

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Probability of the expert."""
        return self.preferences(token)[expert]

    def _keys(self, token: int) -> list[float]:
        if not self.inputs.training and self.config.evaluation == "greedy":
            return self.preferences(token)
        seeds = self.inputs.row_seeds
        if seeds is None:
            raise ValueError("the policy needs a seed per token that the batch does not give")
        draws = [max(uniform(seeds[token], expert, stream=2), 2.0**-54) for expert in range(self.num_experts)]
        return [logit - math.log(-math.log(u)) for logit, u in zip(self.logits[token], draws, strict=True)]
