"""The ledger notices what is missing, what comes twice, what is late and what is wrong."""

from __future__ import annotations

from moe_runtime.chaos.ledger import Ending, Ledger, Outcome
from moe_runtime.wire.messages import Report


def ok(request_id: str, *, elapsed_s: float = 0.01, **counts: int) -> Outcome:
    report = Report(
        request_id=request_id,
        layer="layer",
        table_version=1,
        num_tokens=counts.get("num_tokens", 1),
        num_assignments=2,
        num_served=counts.get("num_served", 2),
        num_dropped_capacity=0,
        num_dropped_failure=counts.get("num_dropped_failure", 0),
        num_rerouted=0,
    )
    return Outcome(Ending.OK, elapsed_s, 1.0, report=report)


def test_each_request_has_one_outcome_and_the_sums_are_those_of_all():
    ledger = Ledger()
    first, second, third = ledger.enter(2), ledger.enter(2), ledger.enter(6)
    ledger.close(second, ok("b", num_tokens=3, num_served=1, num_dropped_failure=1))
    ledger.close(first, ok("a"))
    ledger.close(third, Outcome(Ending.TYPED_ERROR, 0.2, 1.0, error="OverloadedError"))
    sums = ledger.sums()
    assert (sums.num_requests, sums.num_ended, sums.num_lost, sums.num_wrong, sums.num_late) == (3, 3, 0, 0, 0)
    assert sums.endings == {Ending.OK: 2, Ending.TYPED_ERROR: 1}
    assert sums.errors == {"OverloadedError": 1}
    assert sums.counts["num_tokens"] == 4
    assert (sums.counts["num_served"], sums.counts["num_dropped_failure"]) == (3, 1)
    assert sums.failed_assignments == 6
    assert ledger.latencies_s() == [0.01, 0.01]


def test_a_request_without_an_outcome_is_lost():
    ledger = Ledger()
    ledger.enter(1)
    ledger.close(ledger.enter(1), ok("a"))
    assert ledger.sums().num_lost == 1


def test_a_second_outcome_of_a_request_is_wrong_and_counts_once():
    ledger = Ledger()
    number = ledger.enter(1)
    ledger.close(number, ok("a"))
    ledger.close(number, ok("b"))
    sums = ledger.sums()
    assert (sums.num_wrong, sums.num_ended, sums.counts["num_served"]) == (1, 1, 2)
    assert "it had ended before" in ledger.examples()[0]


def test_an_id_that_is_answered_twice_is_wrong():
    ledger = Ledger()
    ledger.close(ledger.enter(1), ok("a"))
    ledger.close(ledger.enter(1), ok("a"))
    assert ledger.sums().num_wrong == 1
    assert "its id a was answered before" in ledger.examples()[0]


def test_what_comes_more_than_a_tenth_of_a_second_after_its_deadline_is_late():
    ledger = Ledger()
    ledger.close(ledger.enter(1), ok("a", elapsed_s=1.09))
    assert ledger.sums().num_late == 0
    ledger.close(ledger.enter(1), ok("b", elapsed_s=1.11))
    sums = ledger.sums()
    assert (sums.num_late, sums.num_wrong) == (1, 0)
    assert abs(sums.worst_overshoot_s - 0.11) < 1e-9


def test_an_error_may_be_late_too():
    ledger = Ledger()
    ledger.close(ledger.enter(1), Outcome(Ending.TYPED_ERROR, 1.2, 1.0, error="DeadlineExceededError"))
    assert ledger.sums().num_late == 1


def test_the_callers_own_lag_excuses_and_is_counted():
    ledger = Ledger()
    ledger.close(ledger.enter(1), Outcome(Ending.TYPED_ERROR, 1.2, 1.0, lag_s=0.15, error="DeadlineExceededError"))
    sums = ledger.sums()
    assert (sums.num_late, sums.num_excused) == (0, 1)


def test_mistakes_are_counted_by_request_and_kept_in_words():
    ledger = Ledger()
    ledger.close(ledger.enter(1), Outcome(Ending.OK, 0.1, 1.0, report=ok("a").report, mistakes=("one", "two")))
    ledger.note_mistake("counters differ")
    assert ledger.sums().num_wrong == 2
    assert ledger.examples() == ("request 1: one; two", "counters differ")


def test_errors_of_requests_that_were_made_to_fail_are_told_from_the_others():
    ledger = Ledger()
    for is_poisoned in (True, False, True):
        outcome = Outcome(Ending.TYPED_ERROR, 0.1, 1.0, error="PoisonedRequestError", is_poisoned=is_poisoned)
        ledger.close(ledger.enter(1), outcome)
    sums = ledger.sums()
    assert sums.errors == {"PoisonedRequestError": 3}
    assert sums.innocent_errors == {"PoisonedRequestError": 1}
