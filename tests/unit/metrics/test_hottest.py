from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.metrics.hottest import OTHER, HottestExperts


def series(hottest: HottestExperts, *counters: float) -> dict[str, float]:
    """Split one counter per expert, which is also its load."""
    totals = np.array(counters, dtype=np.float64)
    return {each.label: float(each.values[0]) for each in hottest.split(totals[:, None], totals)}


def test_all_experts_have_names_where_there_are_few() -> None:
    assert series(HottestExperts(["a", "b"], most=2), 3, 4) == {"a": 3, "b": 4}


def test_the_rest_is_summed() -> None:
    assert series(HottestExperts(["a", "b", "c", "d"], most=1), 5, 3, 2, 1) == {"a": 5, OTHER: 6}


def test_a_hot_expert_takes_the_name_of_a_cold_one_and_no_series_goes_back() -> None:
    hottest = HottestExperts(["a", "b", "c"], most=1)
    assert series(hottest, 1, 1, 1) == {"a": 1, OTHER: 2}
    assert series(hottest, 1, 10, 1) == {"b": 0, OTHER: 11}
    assert series(hottest, 1, 15, 2) == {"b": 5, OTHER: 12}


def test_what_was_counted_before_a_name_ended_and_never_shown_goes_to_the_others() -> None:
    hottest = HottestExperts(["a", "b"], most=1)
    assert series(hottest, 1, 1) == {"a": 1, OTHER: 1}
    assert series(hottest, 3, 7) == {"b": 0, OTHER: 9}


def test_an_expert_that_gets_its_name_back_counts_on() -> None:
    hottest = HottestExperts(["a", "b"], most=1)
    assert series(hottest, 10, 1) == {"a": 10, OTHER: 1}
    assert series(hottest, 10, 30) == {"b": 0, OTHER: 30}
    assert series(hottest, 100, 30) == {"a": 10, OTHER: 120}
    assert series(hottest, 101, 31) == {"a": 11, OTHER: 121}


def test_places_do_not_change_for_a_small_lead() -> None:
    hottest = HottestExperts(["a", "b"], most=1)
    assert series(hottest, 10, 20).keys() == {"a", OTHER}
    assert series(hottest, 10, 21).keys() == {"b", OTHER}


def test_an_expert_that_is_called_other_is_among_the_others() -> None:
    assert series(HottestExperts([OTHER, "b", "c"], most=1), 9, 1, 1) == {"b": 1, OTHER: 10}
    assert series(HottestExperts([OTHER], most=1), 9) == {OTHER: 9}


@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 100), min_size=5, max_size=5), min_size=1, max_size=12))
def test_named_series_and_the_rest_never_go_back_and_never_count_twice(most: int, steps: list[list[int]]) -> None:
    hottest = HottestExperts("abcde", most=most)
    totals = np.zeros(5)
    before: dict[str, float] = {}
    for step in steps:
        totals = totals + step
        now = series(hottest, *totals)
        assert len(now) == most + 1
        for label, value in now.items():
            assert value >= before.get(label, 0.0)
        assert sum(now.values()) <= totals.sum()
        before.update(now)
        # With the series that have ended, everything is counted once.
        assert sum(before.values()) == totals.sum()
