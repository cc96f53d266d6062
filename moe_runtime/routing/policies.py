"""Policies: router logits become assignments. Second stage: gate -> policy -> capacity -> plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from moe_runtime.config.models import DensePolicyConfig, SwitchPolicyConfig
from moe_runtime.errors import ConfigError, InvalidRequestError, ShapeError
from moe_runtime.routing.assignments import Assignments, Grid, Pairs, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.models import PolicyConfig

Score = Literal["softmax", "sigmoid", "softmax_after_topk"]


class Policy(Protocol):
    """How scores become assignments. Stateless: safe to call from several threads."""

    @property
    def max_k(self) -> int:
        """Most experts that one token asks for."""
        ...

    @property
    def batch_coupled(self) -> bool:
        """Whether a token's assignments depend on the other tokens of its batch."""
        ...

    @property
    def can_reroute(self) -> bool:
        """Whether there are scores for the experts that a token did not select."""
        ...

    @property
    def weight_rule(self) -> WeightRule:
        """How the scores of assignments become weights."""
        ...

    def assign(
        self, router_logits: Tensor, *, k: Tensor | int | None = None, mask: Tensor | None = None
    ) -> Assignments:
        """The assignments that the tokens of a batch ask for.

        Args:
            router_logits: ``(num_tokens, num_experts)``, float32.
            k: Experts per token, at most ``max_k``: one number, or an integer tensor ``(num_tokens,)``, a row
                below 1 asking for none; ``max_k`` when None.
            mask: Bool ``(num_tokens,)``; rows that are False are padding and ask for nothing.

        Returns:
            Assignments in k-major order: all first choices before any second choice.

        Raises:
            InvalidRequestError: If a number ``k`` is not between 1 and ``max_k``.
            ShapeError: If a tensor has another shape.
        """
        ...


@dataclass(frozen=True)
class TopKPolicy:
    """Each token asks for its ``max_k`` experts of the highest score.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538). ``dense`` is the case of all experts, ``switch``
    that of one expert with its un-normalised probability. Selection is ``torch.topk``, ties included.

    Attributes:
        num_experts: Experts of the layer.
        max_k: Experts per token.
        score: How logits become scores.
        weight_rule: How scores become weights.
        can_reroute: Whether assignments carry the scores of unselected experts.
        batch_coupled: Never: a token's assignments depend on its own logits alone.
    """

    num_experts: int
    max_k: int
    score: Score
    weight_rule: WeightRule
    can_reroute: bool = True
    batch_coupled: Literal[False] = False

    def assign(
        self, router_logits: Tensor, *, k: Tensor | int | None = None, mask: Tensor | None = None
    ) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``."""
        self._check(router_logits, k=k, mask=mask)
        all_scores = self._all_scores(router_logits)
        width = k if isinstance(k, int) else self.max_k
        scores, expert_ids = torch.topk(all_scores, width, dim=-1)
        requested = _requested(width, k=k, mask=mask)
        if self.score == "softmax_after_topk":
            scores = _softmax_over(scores, requested)
        grid = Grid(expert_ids, scores)
        return Assignments(
            choices=grid if requested is None else _requested_pairs(grid, requested),
            all_scores=all_scores if self.can_reroute else None,
            num_tokens=router_logits.shape[0],
            num_experts=self.num_experts,
            weight_rule=self.weight_rule,
        )

    def _all_scores(self, router_logits: Tensor) -> Tensor:
        # float32: bfloat16 ties would make the order depend on the batch. An overflown logit is taken as the
        # largest number and NaN as 0, because a softmax over infinities is NaN.
        logits = torch.nan_to_num(router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)))
        if self.score == "softmax":
            return torch.softmax(logits, dim=-1)
        return torch.sigmoid(logits) if self.score == "sigmoid" else logits

    def _check(self, router_logits: Tensor, *, k: Tensor | int | None, mask: Tensor | None) -> None:
        if router_logits.dim() != 2 or router_logits.shape[1] != self.num_experts:
            raise ShapeError(
                f"router_logits: expected shape (num_tokens, {self.num_experts}), found {tuple(router_logits.shape)}"
            )
        if isinstance(k, int) and not 1 <= k <= self.max_k:
            raise InvalidRequestError(f"k: expected 1 to {self.max_k}, the layer's own, found {k}")
        for name, rows in (("k", k), ("mask", mask)):
            if isinstance(rows, torch.Tensor) and rows.shape != router_logits.shape[:1]:
                raise ShapeError(
                    f"{name}: expected one entry per token, shape ({router_logits.shape[0]},), "
                    f"found {tuple(rows.shape)}"
                )


def build_policy(config: PolicyConfig, *, num_experts: int) -> Policy:
    """The policy that a configuration block describes, for a layer of ``num_experts``.

    Raises:
        ConfigError: If ``k`` exceeds the number of experts.
    """
    if isinstance(config, DensePolicyConfig):
        rule = WeightRule(normalize=config.normalize)
        return TopKPolicy(num_experts, num_experts, "softmax", rule, can_reroute=False)
    if isinstance(config, SwitchPolicyConfig):
        return TopKPolicy(num_experts, 1, "softmax", WeightRule(normalize="none"))
    if config.k > num_experts:
        raise ConfigError(f"policy.k: expected at most the layer's {num_experts} experts, found {config.k}")
    rule = WeightRule(
        normalize=config.normalize,
        norm_p=config.norm_p,
        scaling_factor=config.scaling_factor,
        softmax_over_set=config.score == "softmax_after_topk",
    )
    return TopKPolicy(num_experts, config.k, config.score, rule)


def _requested(width: int, *, k: Tensor | int | None, mask: Tensor | None) -> Tensor | None:
    """Which choices are asked for, bool ``(num_tokens, width)``; None is all."""
    per_row = k if isinstance(k, torch.Tensor) else None
    if per_row is None:
        return None if mask is None else mask.bool()[:, None].expand(-1, width)
    requested = torch.arange(width, device=per_row.device) < per_row[:, None]
    return requested if mask is None else requested & mask.bool()[:, None]


def _requested_pairs(grid: Grid, requested: Tensor) -> Pairs:
    kept = requested.t().reshape(-1).nonzero().squeeze(1)
    every = grid.pairs
    return Pairs(
        token_ids=every.token_ids[kept],
        expert_ids=every.expert_ids[kept],
        scores=every.scores[kept],
        ranks=every.ranks[kept],
    )


def _softmax_over(logits: Tensor, requested: Tensor | None) -> Tensor:
    if requested is not None:
        # The lowest number, not -inf: a row that asks for nothing would be NaN, and poison its gradient.
        logits = logits.masked_fill(~requested, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1)
