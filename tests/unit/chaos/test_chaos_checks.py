"""Each check of an answer fires on an answer that is wrong in just that way, and on no right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moe_runtime.chaos.checks import mistakes_in_answer, mistakes_in_error
from moe_runtime.chaos.faulty_expert import Poison
from moe_runtime.chaos.layer import LAYER, draw_weights
from moe_runtime.chaos.questions import Question, draw_poisoned, draw_question
from moe_runtime.chaos.reference import Reference, Routing
from moe_runtime.errors import (
    DeadlineExceededError,
    ExpertError,
    InternalError,
    OverloadedError,
    PoisonedRequestError,
    ShapeError,
    UnavailableError,
)
from moe_runtime.wire.messages import DROPPED_CAPACITY, DROPPED_FAILURE, SERVED, ForwardResult, Report

REFERENCE = Reference(draw_weights(0))


def question(*, return_routing: bool = True) -> Question:
    """Four rows: two ask for two experts, one for one, one is masked."""
    rows = np.random.default_rng(5).standard_normal((4, 32)).astype(np.float32)
    return Question(rows, np.array([2, 1, 2, 0]), return_routing=return_routing)


def answer(asked: Question, *, dropped: tuple[int, ...] = ()) -> ForwardResult:
    """The right answer, where the assignments of these rows were dropped by failure."""
    routing, _ = REFERENCE.routing(asked.inputs, asked.k)
    is_served = ~np.isin(routing.token_ids, dropped)
    served = Routing(routing.token_ids[is_served], routing.expert_ids[is_served], routing.weights[is_served])
    report = Report(
        request_id="r",
        layer=LAYER,
        table_version=1,
        num_tokens=len(asked.inputs),
        num_assignments=asked.num_assignments,
        num_served=int(is_served.sum()),
        num_dropped_capacity=0,
        num_dropped_failure=int((~is_served).sum()),
        num_rerouted=0,
    )
    if asked.return_routing:
        report = replace(
            report,
            token_ids=routing.token_ids,
            expert_ids=routing.expert_ids,
            expert_weights=np.where(is_served, routing.weights, 0).astype(np.float32),
            outcomes=np.where(is_served, SERVED, DROPPED_FAILURE).astype(np.uint8),
        )
    return ForwardResult(REFERENCE.outputs(asked.inputs, served).astype(np.float32), report)


def mistakes(asked: Question, result: ForwardResult) -> str:
    return "\n".join(mistakes_in_answer(asked, result, REFERENCE))


@pytest.mark.parametrize("return_routing", [True, False])
@pytest.mark.parametrize("dropped", [(), (0,), (0, 1, 2)])
def test_right_answers_have_no_mistakes(return_routing: bool, dropped: tuple[int, ...]):
    asked = question(return_routing=return_routing)
    assert mistakes(asked, answer(asked, dropped=dropped)) == ""


def test_rows_that_are_missing_are_a_mistake():
    result = answer(question())
    assert "expected [4, 32] float32, found [3, 32]" in mistakes(
        question(), replace(result, outputs=result.outputs[:3])
    )


def test_another_dtype_is_a_mistake():
    result = answer(question())
    assert "found [4, 32] float64" in mistakes(question(), replace(result, outputs=result.outputs.astype(np.float64)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_mistake(value: float):
    asked = question(return_routing=False)
    result = answer(asked, dropped=(0,))
    result.outputs[1, 3] = value
    assert "1 rows are not finite" in mistakes(asked, result)


@pytest.mark.parametrize("return_routing", [True, False])
def test_a_served_row_that_is_off_is_a_mistake(return_routing: bool):
    asked = question(return_routing=return_routing)
    result = answer(asked)
    result.outputs[2, 0] += 1e-3
    assert "1 served rows are off by up to 1.0e-03" in mistakes(asked, result)


def test_a_served_row_that_is_off_by_rounding_is_none():
    result = answer(question())
    result.outputs[2, 0] += 2e-6
    assert mistakes(question(), result) == ""


@pytest.mark.parametrize("row", [0, 3], ids=["dropped", "masked"])
def test_a_row_that_nobody_served_differs_in_one_bit(row: int):
    result = answer(question(), dropped=(0,))
    result.outputs[row, 0] = np.nextafter(result.outputs[row, 0], np.float32(100))
    assert "1 rows that nobody served differ from the input" in mistakes(question(), result)


def test_the_rows_of_another_request_are_a_mistake():
    result = answer(question())
    assert "off by" in mistakes(question(), replace(result, outputs=result.outputs[[2, 1, 0, 3]]))


def with_report(**changes: object) -> Callable[[ForwardResult], ForwardResult]:
    return lambda result: replace(result, report=replace(result.report, **changes))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_report(layer="other"), "expected 4 rows of layer, found 4 of other"),
        (with_report(num_tokens=5), "expected 4 rows of layer, found 5"),
        (with_report(num_assignments=6, num_served=6), "expected 5 assignments, found 6"),
        (with_report(num_served=4), "expected parts of 5 assignments, found served 4"),
        (with_report(num_served=6, num_dropped_capacity=-1), "expected parts of 5 assignments, found served 6"),
        (with_report(num_served=4, num_dropped_failure=1), "expected the counted outcomes [4, 0, 1], found [5, 0, 0]"),
        (with_report(token_ids=None), "expected 5 entries, found 0"),
        (with_report(token_ids=np.array([0, 0, 1, 2, 4])), "1 entries name no row"),
        (with_report(expert_ids=np.array([0, 1, 1, 0, 3])), "1 entries name no row or no expert"),
        (with_report(token_ids=np.array([0, 0, 1, 2, 3])), "2 rows have more or fewer assignments"),
        (with_report(expert_ids=np.array([1, 1, 0, 0, 1])), "1 assignments name an expert that the row has already"),
        (with_report(expert_weights=np.full(5, 1.5, np.float32)), "expected weights within 0 and 1"),
        (with_report(expert_weights=np.full(5, np.nan, np.float32)), "expected weights within 0 and 1"),
    ],
)
def test_a_report_that_does_not_account_for_everything_is_a_mistake(
    change: Callable[[ForwardResult], ForwardResult], expected: str
):
    assert expected in mistakes(question(), change(answer(question())))


def test_a_weight_of_an_assignment_that_was_not_served_is_a_mistake():
    result = answer(question(), dropped=(0,))
    weights = np.full(5, 0.5, np.float32)
    assert "0 where not served" in mistakes(question(), with_report(expert_weights=weights)(result))


def test_a_drop_of_the_wrong_sort_is_a_mistake():
    result = answer(question(), dropped=(1,))
    outcomes = np.where(result.report.outcomes == SERVED, SERVED, DROPPED_CAPACITY).astype(np.uint8)
    assert "expected the counted outcomes [4, 0, 1], found [4, 1, 0]" in mistakes(
        question(), with_report(outcomes=outcomes)(result)
    )


@pytest.mark.parametrize(
    "error",
    [DeadlineExceededError("x"), OverloadedError("x"), UnavailableError("x"), PoisonedRequestError("x")],
    ids=lambda e: str(type(e)),
)
def test_a_request_may_end_with_what_a_broken_cluster_cannot_help(error: Exception):
    assert mistakes_in_error(question(), error) == ()


@pytest.mark.parametrize(
    "error",
    [InternalError("x"), ShapeError("x"), ExpertError("x")],
    ids=lambda e: str(type(e)),
)
def test_a_right_request_may_not_end_with_anything_else(error: Exception):
    assert mistakes_in_error(question(), error) == (f"a valid request ended with {type(error).__name__}: x",)


def test_a_poisoned_request_may_end_with_its_experts_error_but_not_with_a_defect():
    poisoned = draw_poisoned(np.random.default_rng(0), Poison.EXIT)
    assert mistakes_in_error(poisoned, ExpertError("x")) == ()
    assert mistakes_in_error(poisoned, InternalError("x")) != ()


def test_drawn_questions_are_what_they_say():
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawn = draw_question(rng)
        num_rows = len(drawn.inputs)
        assert 1 <= num_rows <= 512
        assert drawn.inputs[:, 0].max() < 77
        assert drawn.k.shape == (num_rows,)
        options = drawn.options
        expected = 2 if options.k is None else options.k
        mask = True if options.mask is None else options.mask
        assert np.array_equal(drawn.k, np.broadcast_to(expected * np.asarray(mask), num_rows))
