"""Oracle of the policies that ask no gate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.config.policies import HashPolicyConfig, RandomPolicyConfig, RoundRobinPolicyConfig
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair
from moe_runtime.routing.reference.draws import uniform

if TYPE_CHECKING:
    from collections.abc import Sequence


class GateFreeOracle(ChoiceOracle[HashPolicyConfig | RandomPolicyConfig | RoundRobinPolicyConfig]):
    """Oracle of ``hash``, ``random`` and ``round_robin``: of the logits it reads the shape alone."""

    def request(self) -> list[RoutedPair]:
        """As many experts as each token asks for, all of one weight."""
        pairs = []
        for token in self.valid_tokens():
            k = self.choices_of(token, self.config.k)
            for rank, expert in enumerate(self._experts(token)[:k]):
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=1.0 / k))
        return pairs

    def _experts(self, token: int) -> list[int]:
        inputs, config = self.inputs, self.config
        if isinstance(config, RoundRobinPolicyConfig):
            row = token if inputs.row_ids is None else inputs.row_ids[token]
            return [(row * config.k + choice) % self.num_experts for choice in range(config.k)]
        if isinstance(config, HashPolicyConfig):
            return self._drawn(_known(inputs.token_ids)[token], stream=config.seed)
        return self._drawn(_known(inputs.row_seeds)[token], stream=1)

    def _drawn(self, key: int, *, stream: int) -> list[int]:
        """Experts taken one by one out of those left."""
        left = list(range(self.num_experts))
        return [
            left.pop(math.floor(uniform(key, choice, stream=stream) * len(left))) for choice in range(self.config.k)
        ]


def _known(rows: Sequence[int] | None) -> Sequence[int]:
    if rows is None:
        raise ValueError("the policy needs a number per token that the batch does not give")
    return rows
