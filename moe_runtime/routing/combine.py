"""Rows out to the experts and back: gather before dispatch, combine after. Last stage of a batch.

The residual is defined here and nowhere else: ``add`` is ``x + y``; ``passthrough`` is ``y`` for a token with at
least one served assignment, a shared expert's included, and exactly ``x`` for one with none; ``none`` is ``y``, 0 for
such a token; ``blend`` is ``y + (1 - w) x`` with ``w`` the sum of the served weights, those of shared experts left out
(BASE layers, https://arxiv.org/abs/2103.16716, where ``y = a f(x) + (1 - a) x``), exactly ``x`` for such a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ShapeError
from moe_runtime.routing.weights import sum_per_token, weigh_assignments

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.models import ResidualRule, WeightOn
    from moe_runtime.routing.assignments import DispatchPlan

#: Mode of ``torch.embedding_bag``.
_SUM = 0


@dataclass(frozen=True)
class Combined:
    """What a batch's tokens become.

    Attributes:
        outputs: ``(num_tokens, *out_shape)`` in the dtype of the expert outputs; or what ``rows_by_choice`` gives.
        plan: The plan whose rows were summed.
        served: Bool ``(num_planned,)``: which of them; None is all.
    """

    outputs: Tensor
    plan: DispatchPlan
    served: Tensor | None

    @cached_property
    def weights(self) -> Tensor:
        """Weight applied to each planned row, float32 ``(num_planned,)``; 0 where it was not served."""
        return _final_weights(self.plan, self.served).detach().float()


def gather_rows(
    tokens: Tensor, plan: DispatchPlan, *, weight_on: WeightOn, planned_ids: Tensor | slice | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rows to send to the experts.

    Args:
        tokens: The batch, ``(num_tokens, *item_shape)``.
        plan: The plan made for it.
        weight_on: ``input`` multiplies each row by its weight (Llama 4); ``output`` leaves it alone.
        planned_ids: Which planned rows, in which order; all when None.
        out: Where the rows go, rounded to its dtype; new memory when None.

    Returns:
        ``(num_rows, *item_shape)``, contiguous, in the dtype of ``tokens``; or ``out``.

    Raises:
        ShapeError: If the batch has another number of rows than the plan.
    """
    _check_tokens(tokens, plan)
    token_ids = plan.token_ids if planned_ids is None else plan.token_ids[planned_ids]
    if out is not None and weight_on == "output" and out.dtype == tokens.dtype:
        return torch.index_select(tokens, 0, token_ids, out=out)
    rows = tokens.index_select(0, token_ids)
    if weight_on == "input":
        weights = plan.weights if planned_ids is None else plan.weights[planned_ids]
        rows = (rows * _as_column(weights, rows.dim())).to(tokens.dtype)
    return rows if out is None else out.copy_(rows)


def combine(
    tokens: Tensor, expert_outputs: Tensor, plan: DispatchPlan, *, residual: ResidualRule, weight_on: WeightOn,
    served: Tensor | None = None, exact: bool = False,
) -> Combined:  # fmt: skip
    """Each token's sum of expert outputs times their weights, then the residual.

    A planned row that was not served takes no part, whatever it holds. With ``normalize: after_drop`` the
    weights of a token with such rows are normalised over the others. Sums run in order of choice, in float32
    (float64 for float64), and are the same on every run.

    Args:
        tokens: The batch, ``(num_tokens, *item_shape)``; used by the residual.
        expert_outputs: Rows in plan order, ``(num_planned, *out_shape)``.
        plan: The plan that the rows were made for.
        residual: What a token keeps of itself.
        weight_on: ``input`` where the weights were applied by ``gather_rows`` already.
        served: Bool ``(num_planned,)``: which rows an expert answered; None is all.
        exact: Multiply every row by its weight, then sum a token's choices as ``(num_tokens, k)`` slots: bit by
            bit what a layer in one process does. Slower: one more pass over the rows.

    Returns:
        Outputs, and the weights that were applied.

    Raises:
        ShapeError: If rows differ in number from the plan's, or shapes from what the residual needs.
    """
    _check_tokens(tokens, plan)
    _check_outputs(tokens, expert_outputs, plan, residual=residual, served=served)
    if served is not None and bool(served.all()):
        served = None
    answered = _answered(plan, served)
    sum_rows = _slot_sums if exact else _weighted_sums
    sums = sum_rows(expert_outputs, answered, plan=plan, weighted=weight_on == "output")
    outputs = _with_residual(sums, tokens, answered, residual=residual, plan=plan)
    return Combined(outputs=outputs.to(expert_outputs.dtype), plan=plan, served=served)


def rows_by_choice(expert_outputs: Tensor, plan: DispatchPlan, *, served: Tensor | None = None) -> Combined:
    """The experts' rows as they answered, for a caller that weighs and sums them itself.

    Args:
        expert_outputs: Rows in plan order, ``(num_planned, *out_shape)``.
        plan: The plan that the rows were made for.
        served: Bool ``(num_planned,)``: which rows an expert answered; None is all.

    Returns:
        Outputs ``(num_planned, *out_shape)``, by token, then by choice; zeros where no expert answered.
    """
    if served is not None:
        # Rows that nobody answered hold anything, NaN included.
        expert_outputs = expert_outputs.where(_as_column(served, expert_outputs.dim()), 0.0)
    return Combined(outputs=expert_outputs.index_select(0, plan.rows_by_token), plan=plan, served=served)


@dataclass(frozen=True)
class _Answered:
    """The planned rows to sum, by token, then by choice.

    Attributes:
        row_ids: Which, int64 ``(num_rows,)``.
        weights: Their weights, ``(num_rows,)``.
        per_token: How many each token has, if it is the same for all; None where it is not known to be.
    """

    row_ids: Tensor
    weights: Tensor
    per_token: int | None


def _answered(plan: DispatchPlan, served: Tensor | None) -> _Answered:
    if served is None:
        return _Answered(plan.rows_by_token, plan.weights_by_token, plan.rows_per_token)
    row_ids = plan.rows_by_token[served[plan.rows_by_token]]
    return _Answered(row_ids, _final_weights(plan, served)[row_ids], None)


def _with_residual(
    sums: Tensor, tokens: Tensor, answered: _Answered, *, residual: ResidualRule, plan: DispatchPlan
) -> Tensor:
    """``sums``, changed in place, with what each token keeps of itself."""
    if residual == "add":
        return sums.add_(tokens)
    if residual == "blend":
        kept = 1.0 - _blended_weights(answered, plan=plan).to(sums.dtype)
        return sums.add_(_as_column(kept, sums.dim()) * tokens.to(sums.dtype))
    if residual == "passthrough" and answered.per_token is None:
        unanswered = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        unanswered = unanswered.index_fill_(0, plan.token_ids[answered.row_ids], False).nonzero().squeeze(1)
        if unanswered.shape[0] > 0:
            return sums.index_copy_(0, unanswered, tokens[unanswered].to(sums.dtype))
    return sums


def _blended_weights(answered: _Answered, *, plan: DispatchPlan) -> Tensor:
    """Sum of each token's served weights, those of shared experts left out, ``(num_tokens,)``."""
    assignments, weights = plan.admission.assignments, answered.weights
    if assignments.num_shared:
        weights = weights.masked_fill(plan.expert_ids[answered.row_ids] >= assignments.num_routed, 0.0)
    return sum_per_token(weights, plan.token_ids[answered.row_ids], num_tokens=assignments.num_tokens)


def _final_weights(plan: DispatchPlan, served: Tensor | None) -> Tensor:
    if served is None:
        return plan.weights
    assignments = plan.admission.assignments
    if assignments.weight_rule.normalize != "after_drop":
        return plan.weights.where(served, 0.0)
    answered = served.nonzero().squeeze(1)
    weights = weigh_assignments(assignments, plan.assignment_ids[answered])
    return torch.zeros_like(plan.weights).index_copy(0, answered, weights)


def _slot_sums(rows: Tensor, answered: _Answered, *, plan: DispatchPlan, weighted: bool) -> Tensor:
    """Sum over slots ``(num_tokens, k, *out_shape)`` of ``weights * rows``; slots without a row hold 0."""
    assignments, row_ids = plan.admission.assignments, answered.row_ids
    dtype = torch.promote_types(rows.dtype, torch.float32)
    products = rows[row_ids].to(dtype)
    if weighted:
        products = products * _as_column(answered.weights.to(dtype), rows.dim())
    if answered.per_token is not None:
        return products.reshape(assignments.num_tokens, answered.per_token, *rows.shape[1:]).sum(dim=1)
    ranks = assignments.ranks[plan.assignment_ids[row_ids]]
    num_slots = int(assignments.ranks.max()) + 1 if assignments.ranks.numel() else 0
    slots = products.new_zeros((assignments.num_tokens * num_slots, *rows.shape[1:]))
    slots = slots.index_copy(0, plan.token_ids[row_ids] * num_slots + ranks, products)
    return slots.reshape(assignments.num_tokens, num_slots, *rows.shape[1:]).sum(dim=1)


def _weighted_sums(rows: Tensor, answered: _Answered, *, plan: DispatchPlan, weighted: bool) -> Tensor:
    """Sum of ``weights * rows`` over each token's rows, ``(num_tokens, *out_shape)``."""
    num_tokens, row_ids = plan.admission.assignments.num_tokens, answered.row_ids
    # At least float32: half-precision sums would depend on the order and lose the small terms.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    out_shape = rows.shape[1:]
    if row_ids.shape[0] == 0:
        return torch.zeros((num_tokens, *out_shape), dtype=dtype, device=rows.device)
    if answered.per_token is None:
        token_ids = plan.token_ids[row_ids]
        starts = torch.searchsorted(token_ids, torch.arange(num_tokens, device=token_ids.device))
    else:
        starts = torch.arange(0, row_ids.shape[0], answered.per_token, device=row_ids.device)
    weights = answered.weights.to(dtype) if weighted else None
    # What torch.nn.functional.embedding_bag calls after checks that cost a small batch as much as the sums.
    sums = torch.embedding_bag(rows.flatten(1).to(dtype), row_ids, starts, mode=_SUM, per_sample_weights=weights)[0]
    return sums.reshape(num_tokens, *out_shape)


def _as_column(values: Tensor, num_dims: int) -> Tensor:
    return values.reshape(-1, *(1,) * (num_dims - 1))


def _check_tokens(tokens: Tensor, plan: DispatchPlan) -> None:
    num_tokens = plan.admission.assignments.num_tokens
    if tokens.shape[0] != num_tokens:
        raise ShapeError(f"tokens: the plan was made for {num_tokens} rows, found {tokens.shape[0]}")


def _check_outputs(
    tokens: Tensor, expert_outputs: Tensor, plan: DispatchPlan, *, residual: ResidualRule, served: Tensor | None
) -> None:
    if expert_outputs.shape[0] != plan.num_planned:
        raise ShapeError(
            f"expert_outputs: expected the plan's {plan.num_planned} rows, found {expert_outputs.shape[0]}"
        )
    if served is not None and served.shape != plan.token_ids.shape:
        raise ShapeError(f"served: expected shape ({plan.num_planned},), found {tuple(served.shape)}")
    if residual != "none" and expert_outputs.shape[1:] != tokens.shape[1:]:
        raise ShapeError(
            f"residual {residual}: expected outputs of the item shape {tuple(tokens.shape[1:])}, "
            f"found {tuple(expert_outputs.shape[1:])}"
        )
