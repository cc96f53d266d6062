"""The values that pass between the stages of routing: assignments, admissions and the dispatch plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.models import Normalize


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
    """

    normalize: Normalize = "before_drop"
    norm_p: float = 1.0
    scaling_factor: float = 1.0
    softmax_over_set: bool = False


@dataclass(frozen=True)
class Assignments:
    """(token, expert) pairs that a policy asks for, in coordinate form, in k-major order.

    All first choices stand before any second choice; within a choice, by token.

    Attributes:
        token_ids: Row of the batch, int64 ``(num_assignments,)``.
        expert_ids: Expert of the layer, int64 ``(num_assignments,)``.
        scores: Unbiased, un-normalised score of the pair, float32 ``(num_assignments,)``.
        ranks: Choice, 0 for a token's first, int64 ``(num_assignments,)``.
        all_scores: Scores of every pair for rerouting, float32 ``(num_tokens, num_experts)``; None where the
            policy has none for unselected experts.
        num_tokens: Rows of the batch, padding included.
        num_experts: Experts of the layer.
        weight_rule: How scores become weights.
    """

    token_ids: Tensor
    expert_ids: Tensor
    scores: Tensor
    ranks: Tensor
    all_scores: Tensor | None
    num_tokens: int
    num_experts: int
    weight_rule: WeightRule


@dataclass(frozen=True)
class Admission:
    """Assignments after capacity was enforced, in the order of the assignments they came from.

    Attributes:
        assignments: The assignments, with experts and scores replaced where they were rerouted.
        admitted: Bool ``(num_assignments,)``: has a place at its expert.
        rerouted: Bool ``(num_assignments,)``: admitted at another expert than the one it asked for.
        capacity: Places per expert; None is dropless.
    """

    assignments: Assignments
    admitted: Tensor
    rerouted: Tensor
    capacity: int | None


@dataclass(frozen=True)
class DispatchPlan:
    """Which rows go to which expert, and with which weights they come back.

    A planned row is an admitted assignment; rows are ordered by expert, then by token.

    Attributes:
        token_ids: Row of the batch per planned row, int64 ``(num_planned,)``.
        expert_ids: Expert per planned row, ascending, int64 ``(num_planned,)``.
        scores: Score per planned row, float32 ``(num_planned,)``.
        weights: Score over its denominator, scaled, float32 ``(num_planned,)``; final unless the rule is
            ``after_drop`` and an expert fails.
        assignment_ids: Index of the planned row in the admission, int64 ``(num_planned,)``.
        expert_offsets: Planned rows of expert ``e`` are ``[expert_offsets[e], expert_offsets[e + 1])``,
            int64 ``(num_experts + 1,)``.
        admission: What the plan was made from.
    """

    token_ids: Tensor
    expert_ids: Tensor
    scores: Tensor
    weights: Tensor
    assignment_ids: Tensor
    expert_offsets: Tensor
    admission: Admission

    @property
    def num_planned(self) -> int:
        """Number of planned rows."""
        return int(self.token_ids.shape[0])
