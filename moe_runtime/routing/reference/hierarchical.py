"""Oracle of the policies with two levels of softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.config.policies import HierarchicalPolicyConfig
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.reference.choices import ChoiceOracle, RoutedPair, softmax

if TYPE_CHECKING:
    from collections.abc import Sequence


class HierarchicalOracle(ChoiceOracle[HierarchicalPolicyConfig]):
    """Oracle of ``hierarchical``, both modes."""

    @property
    def num_experts(self) -> int:
        """Experts that the policy routes to; the first level has logits of its own."""
        width = self.inputs.router_logits.shape[1]
        return width - (self.config.num_groups if self._is_tree else 1)

    @property
    def rule(self) -> WeightRule:
        """How scores become weights."""
        return WeightRule(self.config.normalize)

    def request(self) -> list[RoutedPair]:
        """Each token's experts in order of their scores, as many as it asks for."""
        pairs = []
        for token in self.valid_tokens():
            scores = self._products(token)
            chosen = self._tree_choice(token) if self._is_tree else self._branch_choice(token)
            chosen.sort(key=lambda expert: -scores[expert])
            most = self.config.k_groups * self.config.k if self._is_tree else self.config.k
            for rank, expert in enumerate(chosen[: self.choices_of(token, most)]):
                pairs.append(RoutedPair(token, rank, requested=expert, expert=expert, score=scores[expert]))
        return pairs

    def preferences(self, token: int) -> list[float]:
        """Products of both levels; in a tree -inf in groups that were not chosen."""
        products = self._products(token)
        if not self._is_tree:
            return products
        chosen = {expert for group in self._best_groups(token) for expert in self._members(group)}
        return [product if expert in chosen else -math.inf for expert, product in enumerate(products)]

    def score(self, token: int, expert: int, held: Sequence[int]) -> float:
        """Product of both levels."""
        return self._products(token)[expert]

    @property
    def _is_tree(self) -> bool:
        return self.config.mode == "tree"

    def _products(self, token: int) -> list[float]:
        row = self.logits[token]
        if not self._is_tree:
            shared, others = softmax(row[:2])
            return [shared, *(others * chance for chance in softmax(row[2:]))]
        num_groups = self.config.num_groups
        products = []
        for group, chance in enumerate(softmax(row[:num_groups])):
            inside = softmax([row[num_groups + expert] for expert in self._members(group)])
            products += [chance * each for each in inside]
        return products

    def _members(self, group: int) -> range:
        size = self.num_experts // self.config.num_groups
        return range(group * size, (group + 1) * size)

    def _best_groups(self, token: int) -> list[int]:
        row = self.logits[token]
        return sorted(range(self.config.num_groups), key=lambda group: -row[group])[: self.config.k_groups]

    def _tree_choice(self, token: int) -> list[int]:
        products = self._products(token)
        chosen = []
        for group in self._best_groups(token):
            chosen += sorted(self._members(group), key=lambda expert: -products[expert])[: self.config.k]
        return chosen

    def _branch_choice(self, token: int) -> list[int]:
        products, row = self._products(token), self.logits[token]
        if row[0] >= row[1]:
            return [0]
        return sorted(range(1, self.num_experts), key=lambda expert: -products[expert])[: self.config.k]
