"""How long a request waits for callers that were answered a moment ago."""

from __future__ import annotations

import pytest

from moe_runtime.service.returning import ReturningCallers


def answered(num_requests: int, *, took_s: float, max_wait_s: float = 0.002) -> ReturningCallers:
    """Callers of whom so many were answered at 10 s."""
    callers = ReturningCallers(max_wait_s)
    callers.answered(num_requests, took_s=took_s, now=10.0)
    return callers


def test_nobody_is_missing_before_anybody_was_answered() -> None:
    callers = ReturningCallers(0.002)
    callers.arrived(1.0)
    assert callers.wait_until(1.0, now=1.0) is None


def test_the_first_to_come_back_waits_half_a_batch_for_the_next() -> None:
    callers = answered(3, took_s=0.04)
    callers.arrived(10.005)
    assert callers.wait_until(10.005, now=10.005) == pytest.approx(10.025)


def test_where_batches_are_quick_the_next_may_take_max_wait_but_no_longer_than_a_batch() -> None:
    assert answered(3, took_s=0.003).wait_until(10.0, now=10.0) == pytest.approx(10.002)
    assert answered(3, took_s=0.001).wait_until(10.0, now=10.0) == pytest.approx(10.001)


def test_a_long_max_wait_holds_up_nobody_for_longer_than_a_batch() -> None:
    callers = answered(2, took_s=0.04, max_wait_s=60.0)
    callers.arrived(10.01)
    assert callers.wait_until(10.005, now=10.01) == pytest.approx(10.045)


def test_nobody_is_missing_once_as_many_have_come_as_were_answered() -> None:
    callers = answered(2, took_s=0.04)
    callers.arrived(10.001)
    callers.arrived(10.002)
    assert callers.wait_until(10.001, now=10.002) is None


def test_those_who_stay_away_are_forgotten() -> None:
    callers = answered(3, took_s=0.04)
    callers.arrived(10.005)
    assert callers.wait_until(10.005, now=10.026) is None
    callers.arrived(10.027)
    assert callers.wait_until(10.005, now=10.027) is None


def test_the_oldest_waits_no_longer_than_the_batch_took() -> None:
    callers = answered(9, took_s=0.04)
    for arrived_at in (10.001, 10.01, 10.019, 10.028, 10.037):
        callers.arrived(arrived_at)
    assert callers.wait_until(10.001, now=10.037) == pytest.approx(10.041)


def test_slow_experts_do_not_stretch_the_wait_without_end() -> None:
    callers = answered(2, took_s=30.0)
    callers.arrived(10.05)
    assert callers.wait_until(10.05, now=10.05) == pytest.approx(10.15)


def test_without_max_wait_nobody_waits() -> None:
    callers = answered(2, took_s=1.0, max_wait_s=0.0)
    callers.arrived(10.0)
    assert callers.wait_until(10.0, now=10.0) is None


def test_callers_of_two_batches_are_expected_together() -> None:
    callers = answered(2, took_s=0.04)
    callers.answered(1, took_s=0.04, now=10.001)
    for _ in range(2):
        callers.arrived(10.002)
    assert callers.wait_until(10.002, now=10.002) is not None
    callers.arrived(10.003)
    assert callers.wait_until(10.002, now=10.003) is None
