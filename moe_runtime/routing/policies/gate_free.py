"""Policies that ask no gate: experts by a hash of the token's id, at random, or in turn."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.draws import uniform_draws
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policies.facts import required_fact, row_ids_of
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import RowFact, TokenInfo

# Of the draws of `random`; `hash` has its seed for one.
_RANDOM_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class GateFreePolicy(Policy):
    """Each token asks for ``k`` different experts, each of weight ``1 / k``, whatever is in it."""

    @property
    def num_logits(self) -> int:
        """0: there is nothing to score."""
        return 0

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        num_tokens = logits.shape[0]
        width = self.num_choices(info)
        expert_ids = self._experts(num_tokens, info, device=logits.device)[:, :width]
        scores = logits.new_full((num_tokens, width), 1.0 / width)
        if isinstance(info.k, torch.Tensor):
            scores = (1.0 / info.k.to(scores).clamp(1, width))[:, None].expand(-1, width)
        return self.assignments(only_requested(Grid(expert_ids, scores), requested_choices(width, info)), logits)

    @abstractmethod
    def _experts(self, num_tokens: int, info: TokenInfo, *, device: torch.device) -> Tensor:
        """Different experts for each token, int64 ``(num_tokens, max_k)``; the first of them count."""


@dataclass(frozen=True, kw_only=True)
class HashPolicy(GateFreePolicy):
    """Experts by ``k`` fixed hashes of a token's id (Roller et al. 2021, https://arxiv.org/abs/2106.04426).

    The hash of choice c picks one of the experts that the earlier ones left, so a token's experts differ.

    Attributes:
        seed: Another seed is another assignment of ids to experts.
    """

    seed: int
    reads: frozenset[RowFact] = frozenset({"token_ids"})

    def _experts(self, num_tokens: int, info: TokenInfo, *, device: torch.device) -> Tensor:
        ids = required_fact(info, "token_ids", device=device)
        draws = uniform_draws(ids[:, None], torch.arange(self.max_k, device=device), stream=self.seed)
        return distinct_experts(draws, num_experts=self.num_experts)


@dataclass(frozen=True, kw_only=True)
class RandomPolicy(GateFreePolicy):
    """Experts drawn without replacement, by the seeds of the rows."""

    reads: frozenset[RowFact] = frozenset({"row_seeds"})

    def _experts(self, num_tokens: int, info: TokenInfo, *, device: torch.device) -> Tensor:
        seeds = required_fact(info, "row_seeds", device=device)
        draws = uniform_draws(seeds[:, None], torch.arange(self.max_k, device=device), stream=_RANDOM_STREAM)
        return distinct_experts(draws, num_experts=self.num_experts)


@dataclass(frozen=True, kw_only=True)
class RoundRobinPolicy(GateFreePolicy):
    """Experts in turn: choice c of row r of a request is expert ``(r * k + c) % num_experts``, k being ``max_k``."""

    reads: frozenset[RowFact] = frozenset({"row_ids"})

    def _experts(self, num_tokens: int, info: TokenInfo, *, device: torch.device) -> Tensor:
        rows = row_ids_of(info, num_tokens=num_tokens, device=device)
        return (rows[:, None] * self.max_k + torch.arange(self.max_k, device=device)) % self.num_experts


def distinct_experts(draws: Tensor, *, num_experts: int) -> Tensor:
    """Experts without replacement: a draw ``u`` takes the ``floor(u * n)``-th of the ``n`` experts still left.

    Args:
        draws: In [0, 1), float64 ``(num_tokens, k)``, k at most ``num_experts``.
        num_experts: Experts to draw from.

    Returns:
        int64 ``(num_tokens, k)``, in the order of the draws.
    """
    num_left = num_experts - torch.arange(draws.shape[1], device=draws.device)
    places = (draws * num_left).long()
    chosen = places[:, :1]
    for choice in range(1, draws.shape[1]):
        taken = chosen.sort(dim=1).values
        # Below the i-th smallest taken expert are `taken - i` that are left: it is passed by a place beyond those.
        left_below = taken - torch.arange(choice, device=draws.device)
        passed = (left_below <= places[:, choice : choice + 1]).sum(dim=1, keepdim=True)
        chosen = torch.cat([chosen, places[:, choice : choice + 1] + passed], dim=1)
    return chosen
