"""What every policy is, and what it may know of the tokens. Second stage: gate -> policy -> capacity -> plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.assignments import Assignments

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Grid, Pairs, WeightRule

#: What a policy may need to know of each token beside its logits, by its name in ``TokenInfo``.
RowFact = Literal["token_ids", "row_ids", "row_seeds"]


@dataclass(frozen=True)
class TokenInfo:
    """What is known of the tokens of a batch beside their logits; a policy ``reads`` some of it.

    Attributes:
        k: Experts per token, at most the policy's ``max_k``: one number, or an integer tensor ``(num_tokens,)``, a row
            below 1 asking for none; ``max_k`` when None.
        mask: Bool ``(num_tokens,)``; rows that are False are padding and ask for nothing.
        row_seeds: int64 ``(num_tokens,)``: keys of whatever is drawn at random for a row, which depend on the request
            and the row within it, never on the batch.
        row_ids: int64 ``(num_tokens,)``: the row within its request; its index in the batch when None.
        token_ids: int64 ``(num_tokens,)``: the id of the token, such as its place in a vocabulary.
        expert_bias: float32 ``(num_experts,)``: added to scores for the selection alone; none when None.
        training: Whether a policy that differs between training and evaluation does as in training.
    """

    k: Tensor | int | None = None
    mask: Tensor | None = None
    row_seeds: Tensor | None = None
    row_ids: Tensor | None = None
    token_ids: Tensor | None = None
    expert_bias: Tensor | None = None
    training: bool = False


#: Of tokens of which nothing is known.
NO_INFO = TokenInfo()


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """How scores become assignments. Stateless: safe to call from several threads.

    Attributes:
        num_experts: Experts that it routes to.
        max_k: Most experts that one token asks for.
        weight_rule: How the scores of assignments become weights.
        can_reroute: Whether assignments carry scores of the experts that a token did not select.
        batch_coupled: Whether, in evaluation, a token's assignments depend on the other tokens of its batch.
        accepts_k: Whether a token may ask for fewer experts than ``max_k``.
        sets_capacity: Whether it decides itself how many tokens an expert gets; the layer's capacity is null then.
        uses_bias: Whether it selects by ``TokenInfo.expert_bias``.
        reads: What else it reads of ``TokenInfo``.
    """

    num_experts: int
    max_k: int
    weight_rule: WeightRule
    can_reroute: bool = False
    batch_coupled: bool = False
    accepts_k: bool = True
    sets_capacity: bool = False
    uses_bias: bool = False
    reads: frozenset[RowFact] = frozenset()

    @property
    def num_logits(self) -> int:
        """Width of the gate's output; 0 where the gate is not asked."""
        return self.num_experts

    @property
    def mean_k(self) -> float:
        """Experts that a token asks for on average, at most."""
        return float(self.max_k)

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether the seeds of rows decide anything outside training."""
        return "row_seeds" in self.reads

    def assign(self, router_logits: Tensor, info: TokenInfo = NO_INFO) -> Assignments:
        """The assignments that the tokens of a batch ask for.

        Args:
            router_logits: ``(num_tokens, num_logits)``, float32.
            info: What else is known of the tokens.

        Returns:
            Assignments in k-major order: all first choices before any second choice.

        Raises:
            InvalidRequestError: If a number ``k`` is not between 1 and ``max_k``, or is fewer where the policy
                cannot do with fewer; or if something that the policy reads is missing.
            ShapeError: If a tensor has another shape.
        """
        self._check(router_logits, info)
        return self.select(at_least_float32(router_logits), info)

    @abstractmethod
    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """``assign`` of logits that are at least float32 and finite, and of checked ``info``."""

    def num_choices(self, info: TokenInfo) -> int:
        """Choices that are made for every token: the one ``k`` of all, else ``max_k``, of which some may go unasked."""
        return info.k if isinstance(info.k, int) else self.max_k

    def assignments(
        self,
        choices: Grid | Pairs,
        logits: Tensor,
        *,
        all_scores: Tensor | None = None,
        preferences: Tensor | None = None,
        left_out: Pairs | None = None,
    ) -> Assignments:
        """These choices for the tokens of ``logits``, by this policy's rules; see ``Assignments``."""
        return Assignments(
            choices=choices,
            all_scores=all_scores,
            num_tokens=logits.shape[0],
            num_experts=self.num_experts,
            weight_rule=self.weight_rule,
            preferences=preferences,
            left_out=left_out,
        )

    def _check(self, router_logits: Tensor, info: TokenInfo) -> None:
        if router_logits.dim() != 2 or router_logits.shape[1] != self.num_logits:
            raise ShapeError(
                f"router_logits: expected shape (num_tokens, {self.num_logits}), found {tuple(router_logits.shape)}"
            )
        if isinstance(info.k, int) and not 1 <= info.k <= self.max_k:
            raise InvalidRequestError(f"k: expected 1 to {self.max_k}, the layer's own, found {info.k}")
        if info.k is not None and not self.accepts_k and (isinstance(info.k, torch.Tensor) or info.k != self.max_k):
            raise InvalidRequestError("k: expected none, since this policy does not let a token choose, found one")
        for name in ("k", "mask", "row_seeds", "row_ids", "token_ids"):
            rows = getattr(info, name)
            if isinstance(rows, torch.Tensor) and rows.shape != router_logits.shape[:1]:
                raise ShapeError(
                    f"{name}: expected one entry per token, shape ({router_logits.shape[0]},), "
                    f"found {tuple(rows.shape)}"
                )


def at_least_float32(logits: Tensor) -> Tensor:
    """Finite logits, float32 or wider.

    float32: bfloat16 ties would make the order depend on the batch. An overflown logit is taken as the largest number
    and NaN as 0, because a softmax over infinities is NaN.
    """
    return torch.nan_to_num(logits.to(torch.promote_types(logits.dtype, torch.float32)))
