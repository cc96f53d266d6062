"""The pace of a layer is that of late, and only where the layer was the one to be waited for."""

from __future__ import annotations

import pytest

from moe_runtime.service.pace import Pace, ServedLately


def answer(pace: Pace, num_tokens: int, *, joined_at: float, now: float, left_rows_waiting: bool = True) -> None:
    pace.batch_answered(num_tokens, joined_at=joined_at, now=now, left_rows_waiting=left_rows_waiting)


def test_pace_is_unknown_until_a_batch_has_left_rows_waiting() -> None:
    pace = Pace()
    answer(pace, 1, joined_at=0.0, now=1.0, left_rows_waiting=False)
    assert pace.tokens_per_s is None
    assert pace.seconds_for(1000) == 0.0
    answer(pace, 50, joined_at=1.0, now=1.5)
    assert pace.tokens_per_s == pytest.approx(100.0)
    assert pace.seconds_for(20) == pytest.approx(0.2)
    # Half of the way from 1 s: what is quicker is believed sooner.
    assert pace.batch_s == pytest.approx(0.75)


def test_batches_that_overlap_are_not_counted_twice() -> None:
    pace = Pace()
    for number in range(1, 200):
        # Each takes 0.2 s, of which it shares half with the one before.
        answer(pace, 10, joined_at=0.1 * number - 0.2, now=0.1 * number)
    assert pace.tokens_per_s == pytest.approx(100.0, rel=0.01)
    assert pace.batch_s == pytest.approx(0.2)


def test_pace_follows_a_layer_that_becomes_slower_within_about_a_second_of_work() -> None:
    pace = Pace()
    for number in range(1, 31):
        answer(pace, 10, joined_at=0.1 * (number - 1), now=0.1 * number)
    for number in range(1, 31):
        answer(pace, 1, joined_at=2.9 + 0.1 * number, now=3.0 + 0.1 * number)
    assert pace.tokens_per_s == pytest.approx(10.0, rel=0.6)


def test_small_batches_of_an_idle_layer_do_not_make_it_slow_but_quick_ones_make_it_quick_again() -> None:
    pace = Pace()
    answer(pace, 10, joined_at=0.0, now=1.0)
    answer(pace, 1, joined_at=10.0, now=11.0, left_rows_waiting=False)
    assert pace.tokens_per_s == pytest.approx(10.0)
    answer(pace, 1000, joined_at=20.0, now=21.0, left_rows_waiting=False)
    assert pace.tokens_per_s > 500


def test_answers_at_one_moment_count_together() -> None:
    pace = Pace()
    answer(pace, 10, joined_at=1.0, now=1.0)
    assert pace.tokens_per_s is None
    answer(pace, 10, joined_at=1.0, now=2.0)
    answer(pace, 10, joined_at=1.0, now=2.0)
    assert pace.tokens_per_s == pytest.approx(20.0)


def test_share_of_the_served_is_that_of_the_last_windows() -> None:
    served = ServedLately()
    assert served.share("a", now=0.0) == 0.0
    served.add("a", 30, now=0.0)
    served.add("b", 10, now=0.4)
    assert served.share("a", now=0.4) == 0.75
    served.add("b", 20, now=0.6)
    assert served.share("a", now=0.7) == 0.5
    assert served.share("a", now=1.2) == 0.0
    assert served.share("b", now=1.2) == 1.0
    assert served.share("b", now=9.0) == 0.0
