"""The values that pass between the stages of routing: assignments, admissions and the dispatch plan.

What only a report or a rare rule asks for is worked out when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.places import count_per_expert, inverse_permutation

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.policies import Normalize


@dataclass(frozen=True)
class WeightRule:
    """How the scores of a token's assignments become its weights.

    ``weight = scaling_factor * score / (sum(score ** p) ** (1 / p))``, the sum over the assignments that
    ``normalize`` names; without normalising, ``weight = scaling_factor * score``.

    Attributes:
        normalize: The assignments that the norm goes over.
        norm_p: The p of the norm; 1 is the sum.
        scaling_factor: Multiplies the weights, last.
        softmax_over_set: Scores are a softmax over the logits of the token's own assignments. ``all_scores`` are
            logits then, and rerouting takes the softmax anew, as if the full expert had been masked.
        softmax_within: Scores are those of ``near_softmax`` with this limit; ``all_scores`` are logits then, too.
    """

    normalize: Normalize = "before_drop"
    norm_p: float = 1.0
    scaling_factor: float = 1.0
    softmax_over_set: bool = False
    softmax_within: float | None = None


@dataclass(frozen=True)
class Pairs:
    """(token, expert) pairs in coordinate form, in k-major order.

    All first choices stand before any second choice; within a choice, by token.

    Attributes:
        token_ids: Row of the batch, int64 ``(num_assignments,)``.
        expert_ids: Expert of the layer, int64 ``(num_assignments,)``.
        scores: Unbiased, un-normalised score of the pair, float32 ``(num_assignments,)``.
        ranks: Choice, 0 for a token's first, int64 ``(num_assignments,)``.
    """

    token_ids: Tensor
    expert_ids: Tensor
    scores: Tensor
    ranks: Tensor

    def at(self, ids: Tensor | slice) -> Pairs:
        """Some of the pairs: by their places, int64 or a slice, or by a mask, bool ``(num_assignments,)``."""
        return Pairs(self.token_ids[ids], self.expert_ids[ids], self.scores[ids], self.ranks[ids])


@dataclass(frozen=True)
class Grid:
    """The choices of a batch in which every token asks for ``k`` experts, one row per token.

    Attributes:
        expert_ids: First choice first, int64 ``(num_tokens, k)``.
        scores: Unbiased, un-normalised scores, float32 ``(num_tokens, k)``.
    """

    expert_ids: Tensor
    scores: Tensor

    @property
    def k(self) -> int:
        """Experts per token."""
        return self.expert_ids.shape[1]

    @cached_property
    def pairs(self) -> Pairs:
        """The same in coordinate form."""
        num_tokens, device = self.expert_ids.shape[0], self.expert_ids.device
        return Pairs(
            token_ids=torch.arange(num_tokens, device=device).repeat(self.k),
            expert_ids=self.expert_ids.t().reshape(-1),
            scores=self.scores.t().reshape(-1),
            ranks=torch.arange(self.k, device=device).repeat_interleave(num_tokens),
        )


@dataclass(frozen=True)
class Assignments:
    """What a policy asks for: pairs of a token and an expert, as ``Pairs`` has them.

    Attributes:
        choices: The pairs; a grid, of which the rest is quicker to work out, where all tokens ask for as many.
        all_scores: Scores of every pair for rerouting, float32 ``(num_tokens, num_routed)``; None where the
            policy has none for unselected experts.
        num_tokens: Rows of the batch, padding included.
        num_experts: Experts of the layer.
        weight_rule: How scores become weights.
        preferences: What rerouting prefers experts by, of the shape of ``all_scores``, -inf where a token may not go;
            ``all_scores`` themselves when None.
        left_out: Pairs that chance kept from being asked for, at most one per token; a norm ``before_drop`` counts
            them, nothing else does. None where the choices are a grid.
        num_shared: The last so many experts are shared: ``add_shared_experts`` put them behind the policy's choices,
            and a score there is a weight already.
    """

    choices: Pairs | Grid
    all_scores: Tensor | None
    num_tokens: int
    num_experts: int
    weight_rule: WeightRule
    preferences: Tensor | None = None
    left_out: Pairs | None = None
    num_shared: int = 0

    @property
    def num_routed(self) -> int:
        """Experts that the policy routes to: those of ``all_scores``."""
        return self.num_experts - self.num_shared

    @property
    def grid(self) -> Grid | None:
        """The choices, where every token asks for the same number of experts and that is known."""
        return self.choices if isinstance(self.choices, Grid) else None

    @property
    def pairs(self) -> Pairs:
        """The choices in coordinate form."""
        return self.choices.pairs if isinstance(self.choices, Grid) else self.choices

    @property
    def token_ids(self) -> Tensor:
        """Row of the batch, int64 ``(num_assignments,)``."""
        return self.pairs.token_ids

    @property
    def expert_ids(self) -> Tensor:
        """Expert of the layer, int64 ``(num_assignments,)``."""
        return self.pairs.expert_ids

    @property
    def scores(self) -> Tensor:
        """Unbiased, un-normalised score of the pair, float32 ``(num_assignments,)``."""
        return self.pairs.scores

    @property
    def ranks(self) -> Tensor:
        """Choice, 0 for a token's first, int64 ``(num_assignments,)``."""
        return self.pairs.ranks

    @property
    def num_assignments(self) -> int:
        """Number of pairs."""
        return self.choices.expert_ids.numel()

    @cached_property
    def load(self) -> tuple[int, ...]:
        """Assignments that each expert is asked for, one number per expert."""
        return count_per_expert(self.choices.expert_ids.reshape(-1), num_experts=self.num_experts)


@dataclass(frozen=True)
class Selection:
    """Who found a place, in the order of the assignments.

    Attributes:
        admitted: Bool ``(num_assignments,)``: has a place at its expert.
        rerouted: Bool ``(num_assignments,)``: admitted at another expert than the one it asked for.
        asked_expert_ids: Int64 ``(num_assignments,)``: the expert asked for; None where nothing was rerouted.
    """

    admitted: Tensor
    rerouted: Tensor
    asked_expert_ids: Tensor | None = None


@dataclass(frozen=True)
class Admission:
    """Assignments after capacity was enforced, in the order of the assignments they came from.

    Attributes:
        assignments: The assignments, with experts and scores replaced where they were rerouted.
        capacity: Places per expert; None is dropless.
        selection: Who found a place; None where everyone did, at the expert asked for.
    """

    assignments: Assignments
    capacity: int | None
    selection: Selection | None = None

    @property
    def admitted(self) -> Tensor:
        """Bool ``(num_assignments,)``: has a place at its expert."""
        if self.selection is not None:
            return self.selection.admitted
        return torch.ones_like(self.assignments.token_ids, dtype=torch.bool)

    @property
    def rerouted(self) -> Tensor:
        """Bool ``(num_assignments,)``: admitted at another expert than the one it asked for."""
        if self.selection is not None:
            return self.selection.rerouted
        return torch.zeros_like(self.assignments.token_ids, dtype=torch.bool)

    @property
    def asked_expert_ids(self) -> Tensor:
        """Int64 ``(num_assignments,)``: the expert asked for, before any rerouting."""
        if self.selection is not None and self.selection.asked_expert_ids is not None:
            return self.selection.asked_expert_ids
        return self.assignments.expert_ids


@dataclass(frozen=True)
class DispatchPlan:
    """Which rows go to which expert, and with which weights they come back.

    A planned row is an admitted assignment; rows are ordered by expert, then by token. Rows that were moved to another
    expert after the dispatch (``move_rows``) keep their places, so the order is by the expert they were planned for.

    Attributes:
        order: Planned rows as places in the list of the admitted assignments by token, then by choice;
            a permutation, int64 ``(num_planned,)``.
        token_ids: Row of the batch per planned row, int64 ``(num_planned,)``.
        weights_by_token: Score over its denominator, scaled, in the order by token, float32 ``(num_planned,)``;
            final unless the rule is ``after_drop`` and an expert fails.
        ids_by_token: Index in the admission, in the order by token, int64 ``(num_planned,)``; or the grid itself,
            where all of it is planned.
        rows_per_expert: Planned rows of each expert.
        admission: What the plan was made from.
    """

    order: Tensor
    token_ids: Tensor
    weights_by_token: Tensor
    ids_by_token: Tensor | Grid
    rows_per_expert: tuple[int, ...]
    admission: Admission

    @property
    def num_planned(self) -> int:
        """Number of planned rows."""
        return self.token_ids.shape[0]

    @property
    def rows_per_token(self) -> int | None:
        """Planned rows of every token; None where tokens may differ."""
        return self.ids_by_token.k if isinstance(self.ids_by_token, Grid) else None

    @cached_property
    def rows_by_token(self) -> Tensor:
        """Planned rows by token, then by choice, int64 ``(num_planned,)``; the inverse of ``order``."""
        return inverse_permutation(self.order)

    @cached_property
    def weights(self) -> Tensor:
        """``weights_by_token`` per planned row."""
        return self.weights_by_token[self.order]

    @cached_property
    def assignment_ids(self) -> Tensor:
        """Index of the planned row in the admission, int64 ``(num_planned,)``."""
        if not isinstance(self.ids_by_token, Grid):
            return self.ids_by_token[self.order]
        return self.order % self.ids_by_token.k * self.admission.assignments.num_tokens + self.token_ids

    @cached_property
    def scores(self) -> Tensor:
        """Score per planned row, float32 ``(num_planned,)``."""
        return self.admission.assignments.scores[self.assignment_ids]

    @cached_property
    def expert_ids(self) -> Tensor:
        """Expert per planned row, int64 ``(num_planned,)``; ascending until rows are moved."""
        return self.admission.assignments.expert_ids[self.assignment_ids]
