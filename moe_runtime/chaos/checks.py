"""What is wrong with an answer, in words: nothing, if all is well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.chaos.layer import LAYER, NUM_EXPERTS
from moe_runtime.chaos.reference import Routing
from moe_runtime.errors import (
    DeadlineExceededError,
    ExpertError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from moe_runtime.wire.messages import DROPPED_CAPACITY, DROPPED_FAILURE, SERVED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moe_runtime.chaos.questions import Question
    from moe_runtime.chaos.reference import Reference
    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.wire.messages import ForwardResult, Report

#: Largest difference from the reference: absolute, and relative to it.
TOLERANCE = 1e-5
#: What any request may end with while parts of the cluster are down. A right one is taken for poison where two hosts
#: happen to die in a row while they work on it: the runtime cannot know, and the ledger counts such errors apart.
_EXCUSED = (DeadlineExceededError, OverloadedError, UnavailableError, PoisonedRequestError)


def mistakes_in_answer(question: Question, result: ForwardResult, reference: Reference) -> tuple[str, ...]:
    """Whatever is wrong with an answer: shape, values, accounts or routing."""
    outputs, report = result.outputs, result.report
    expected_shape = question.inputs.shape
    if outputs.shape != expected_shape or outputs.dtype != np.float32:
        found = f"{list(outputs.shape)} {outputs.dtype}"
        return (f"outputs: expected {list(expected_shape)} float32, found {found}",)
    mistakes = [*_mistakes_in_accounts(question, report)]
    if not np.isfinite(outputs).all():
        mistakes.append(f"outputs: {int((~np.isfinite(outputs)).any(axis=1).sum())} rows are not finite")
    if question.return_routing:
        routing_mistakes = [*_mistakes_in_routing(question, report)]
        mistakes += routing_mistakes or _mistakes_in_values(question, outputs, _served(report), reference)
    elif _is_plain(report):
        served, is_clear = reference.routing(question.inputs, question.k)
        mistakes += _mistakes_in_values(question, outputs, served, reference, judged=is_clear)
    return tuple(mistakes)


def mistakes_in_error(question: Question, error: MoERuntimeError) -> tuple[str, ...]:
    """Whatever is wrong with a request ending in this error: it was a right one, and maybe a poisoned one."""
    if isinstance(error, _EXCUSED) or (question.poison is not None and isinstance(error, ExpertError)):
        return ()
    return (f"a valid request ended with {type(error).__name__}: {error}",)


def _mistakes_in_accounts(question: Question, report: Report) -> Iterator[str]:
    """Every assignment is accounted for, and none but those asked for."""
    if report.layer != LAYER or report.num_tokens != len(question.inputs):
        expected = f"{len(question.inputs)} rows of {LAYER}"
        yield f"report: expected {expected}, found {report.num_tokens} of {report.layer}"
    if report.num_assignments != question.num_assignments:
        yield f"report: expected {question.num_assignments} assignments, found {report.num_assignments}"
    parts = (report.num_served, report.num_dropped_capacity, report.num_dropped_failure)
    if sum(parts) != report.num_assignments or min(parts) < 0:
        found = "served {}, dropped by capacity {}, by failure {}".format(*parts)
        yield f"report: expected parts of {report.num_assignments} assignments, found {found}"


def _mistakes_in_routing(question: Question, report: Report) -> Iterator[str]:
    """The listed assignments are the counted ones, each row has its own, and none twice at one expert."""
    token_ids, expert_ids, weights, outcomes = _arrays(report)
    if not len(token_ids) == len(expert_ids) == len(weights) == len(outcomes) == report.num_assignments:
        yield f"routing: expected {report.num_assignments} entries, found {len(token_ids)}"
        return
    in_range = (token_ids >= 0) & (token_ids < len(question.inputs)) & (expert_ids >= 0) & (expert_ids < NUM_EXPERTS)
    if not in_range.all():
        yield f"routing: {int((~in_range).sum())} entries name no row or no expert"
        return
    per_row = np.bincount(token_ids, minlength=len(question.inputs))
    if (per_row != question.k).any():
        yield f"routing: {int((per_row != question.k).sum())} rows have more or fewer assignments than they asked for"
    num_pairs = len(np.unique(token_ids * NUM_EXPERTS + expert_ids))
    if num_pairs != len(token_ids):
        yield f"routing: {len(token_ids) - num_pairs} assignments name an expert that the row has already"
    counts = np.bincount(outcomes, minlength=3)[[SERVED, DROPPED_CAPACITY, DROPPED_FAILURE]].tolist()
    reported = [report.num_served, report.num_dropped_capacity, report.num_dropped_failure]
    if counts != reported:
        yield f"routing: expected the counted outcomes {reported}, found {counts}"
    is_served = outcomes == SERVED
    if weights[~is_served].any() or not (np.isfinite(weights) & (weights >= 0) & (weights <= 1 + TOLERANCE)).all():
        yield "routing: expected weights within 0 and 1, and 0 where not served"


def _mistakes_in_values(
    question: Question,
    outputs: NDArray[np.float32],
    served: Routing,
    reference: Reference,
    *,
    judged: NDArray[np.bool_] | None = None,
) -> list[str]:
    """Rows are what the served assignments make of them; rows that nobody served are the input, bit for bit."""
    is_served = np.zeros(len(outputs), dtype=bool)
    is_served[served.token_ids] = True
    changed = (outputs.view(np.uint32) != question.inputs.view(np.uint32)).any(axis=1) & ~is_served
    expected = reference.outputs(question.inputs, served)
    # Bitwise for rows that nobody served: those were judged above.
    is_off = ~np.isclose(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE).all(axis=1) & is_served
    if judged is not None:
        is_off &= judged
    mistakes = []
    if changed.any():
        mistakes.append(f"outputs: {int(changed.sum())} rows that nobody served differ from the input")
    if is_off.any():
        worst = float(np.abs(outputs - expected)[is_off].max())
        mistakes.append(f"outputs: {int(is_off.sum())} served rows are off by up to {worst:.1e}")
    return mistakes


def _is_plain(report: Report) -> bool:
    """Whether the gate's own choice was served, so that its outcome is known without the routing."""
    return report.num_served == report.num_assignments and report.num_rerouted == 0


def _served(report: Report) -> Routing:
    token_ids, expert_ids, weights, outcomes = _arrays(report)
    is_served = outcomes == SERVED
    return Routing(token_ids[is_served], expert_ids[is_served], weights[is_served].astype(np.float64))


def _arrays(
    report: Report,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.uint8]]:
    none = np.empty(0)
    return (
        (none if report.token_ids is None else report.token_ids).astype(np.int64),
        (none if report.expert_ids is None else report.expert_ids).astype(np.int64),
        (none if report.expert_weights is None else report.expert_weights).astype(np.float32),
        (none if report.outcomes is None else report.outcomes).astype(np.uint8),
    )
