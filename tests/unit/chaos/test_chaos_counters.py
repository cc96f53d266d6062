"""Routers' counters against the ledger: how a window can be compared, and what then does not fit."""

from __future__ import annotations

from collections import Counter

import pytest

from moe_runtime.chaos.counters import Comparison, Reading, comparison_of, mistakes_in_counters
from moe_runtime.chaos.ledger import Ending, Sums


def reading(at: float, *, served: int, failed: int, answered: int, ledger: Sums, youngest_s: float = 100.0) -> Reading:
    counts = {
        "num_served": served,
        "num_dropped_capacity": 0,
        "num_dropped_failure": failed,
        "num_retried": 0,
        "num_rerouted": 0,
        "num_hedged": 0,
        "num_answered": answered,
    }
    return Reading(at, counts, ledger, youngest_s)


def sums(*, ok: int, errors: int = 0, served: int = 0, failed: int = 0, failed_assignments: int = 0) -> Sums:
    return Sums(
        num_requests=ok + errors,
        endings=Counter({Ending.OK: ok, Ending.TYPED_ERROR: errors}),
        counts=Counter(num_served=served, num_dropped_failure=failed),
        failed_assignments=failed_assignments,
    )


BEFORE = reading(10.0, served=7, failed=1, answered=3, ledger=sums(ok=2, served=5))
CALM = float("-inf")


def test_a_window_of_answers_alone_is_compared_exactly():
    after = reading(20.0, served=17, failed=3, answered=8, ledger=sums(ok=7, served=15, failed=2))
    assert comparison_of(BEFORE, after, router_fault_at=CALM) is Comparison.EXACT
    assert mistakes_in_counters(BEFORE, after, Comparison.EXACT) == ()


@pytest.mark.parametrize(("served", "failed", "answered"), [(18, 3, 8), (16, 3, 8), (17, 2, 8), (17, 3, 9)])
def test_counters_that_differ_from_the_ledger_by_one_are_a_mistake(served: int, failed: int, answered: int):
    after = reading(20.0, served=served, failed=failed, answered=answered, ledger=sums(ok=7, served=15, failed=2))
    (mistake,) = mistakes_in_counters(BEFORE, after, Comparison.EXACT)
    assert mistake.startswith("counters, exact: expected num_")


@pytest.mark.parametrize(("served", "is_right"), [(16, False), (17, True), (23, True), (24, False)])
def test_requests_without_an_answer_may_have_been_computed_or_not(served: int, is_right: bool):
    ledger = sums(ok=7, errors=2, served=15, failed=2, failed_assignments=6)
    after = reading(20.0, served=served, failed=3, answered=8, ledger=ledger)
    assert comparison_of(BEFORE, after, router_fault_at=CALM) is Comparison.BOUNDED
    assert (mistakes_in_counters(BEFORE, after, Comparison.BOUNDED) == ()) is is_right


@pytest.mark.parametrize(("served", "is_right"), [(16, False), (17, True), (99, True)])
def test_what_a_frozen_router_had_may_have_been_computed_twice(served: int, is_right: bool):
    after = reading(20.0, served=served, failed=3, answered=8, ledger=sums(ok=7, served=15, failed=2))
    assert comparison_of(BEFORE, after, router_fault_at=15.0) is Comparison.AT_LEAST
    assert (mistakes_in_counters(BEFORE, after, Comparison.AT_LEAST) == ()) is is_right


def test_a_router_that_was_restarted_took_its_counters_with_it():
    after = reading(20.0, served=0, failed=0, answered=0, ledger=sums(ok=7, served=15), youngest_s=4.0)
    assert comparison_of(BEFORE, after, router_fault_at=15.0) is Comparison.NONE
    assert mistakes_in_counters(BEFORE, after, Comparison.NONE) == ()
