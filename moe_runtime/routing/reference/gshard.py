"""Oracle of GShard's top-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.policies import GShardPolicyConfig
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, softmax
from moe_runtime.routing.reference.draws import uniform

if TYPE_CHECKING:
    from collections.abc import Sequence


class GShardOracle(ChoiceOracle[GShardPolicyConfig]):
    """Oracle of ``gshard_top2``: the norm ``before_drop`` is that of the pair, whether or not the second is kept."""

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        return WeightRule(self.config.normalize)

    def request(self) -> list[RoutedPair]:
        """Each token's best expert and, by chance, its second."""
        pairs = []
        for token in self.valid_tokens():
            asked = self._best_two(token)[: self.choices_of(token, 2)]
            left_out = self.left_out(token)
            pairs += [
                RoutedPair(token, rank, requested=expert, expert=expert, score=self.preferences(token)[expert])
                for rank, expert in enumerate(asked)
                if expert not in left_out
            ]
        return pairs

    def preferences(self, token: int) -> list[float]:
        """Probability of each expert."""
        return softmax(self.logits[token])

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Probability of the expert."""
        return self.preferences(token)[expert]

    def left_out(self, token: int) -> list[int]:
        """The second expert where it is not kept; none where the token asks for one expert."""
        if self.choices_of(token, 2) < 2 or self._is_kept(token):
            return []
        return self._best_two(token)[1:]

    def _best_two(self, token: int) -> list[int]:
        chances = self.preferences(token)
        return sorted(range(self.num_experts), key=lambda expert: -chances[expert])[:2]

    def _is_kept(self, token: int) -> bool:
        config = self.config
        rule = config.second if self.inputs.training else config.second_in_evaluation
        first, second = (self.preferences(token)[expert] for expert in self._best_two(token))
        share = second / (first + second)
        chance = {"threshold": share / config.threshold, "proportional": 2 * share, "always": 1.0, "never": 0.0}[rule]
        seed = token if self.inputs.row_seeds is None else self.inputs.row_seeds[token]
        return uniform(seed, 1, stream=1) < chance
