"""Oracle of sparsemixer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.config.policies import SparseMixerPolicyConfig
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, softmax

if TYPE_CHECKING:
    from collections.abc import Sequence


class SparseMixerOracle(ChoiceOracle[SparseMixerPolicyConfig]):
    """Oracle of ``sparsemixer``: an expert is weighed with all better ones masked."""

    def request(self) -> list[RoutedPair]:
        """Twice the best expert, the second time with the first masked."""
        pairs = []
        for token in self.valid_tokens():
            for rank, expert in enumerate(self._best_first(token)[: self.choices_of(token, 2)]):
                score = self.score(token, expert, [])
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=score))
        return pairs

    def preferences(self, token: int) -> list[float]:
        """Logits."""
        return self.logits[token]

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Softmax of the expert over those that are not better and within the threshold of it."""
        order, row = self._best_first(token), self.logits[token]
        unmasked = order[order.index(expert) :]
        near = [row[other] for other in unmasked if self._is_near(row[expert], row[other])]
        return softmax(near)[0]

    def _best_first(self, token: int) -> list[int]:
        row = self.logits[token]
        return sorted(range(self.num_experts), key=lambda expert: -row[expert])

    def _is_near(self, best: float, other: float) -> bool:
        size = max(abs(other), best)
        distance = 0.0 if best == other else (best - other) / size if size else math.inf
        return distance <= 2 * self.config.jitter_eps
