"""The bias moves by what all routers were asked for, each assignment counted once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.routing.expert_bias import update_bias
from moe_runtime.service.online_bias import AskedCounts, BiasRule, LayerBias, OnlineBias

RATE = 1e-3


def rule(*experts: str, interval_s: float = 10.0, min_assignments: int = 1) -> BiasRule:
    return BiasRule(experts or ("a", "b", "c"), RATE, interval_s, min_assignments)


def said(incarnation: int, *, layer: str = "l", **asked: int) -> AskedCounts:
    return AskedCounts(incarnation, {layer: asked})


@pytest.fixture
def bias() -> OnlineBias:
    """The bias of one layer, ``l``, with experts a, b and c, of which router 0 has said that it counts from 0."""
    bias = OnlineBias()
    bias.follow({"l": rule()})
    assert not bias.step(0.0)
    bias.take(0, said(7, a=0, b=0, c=0))
    return bias


def counted(bias: OnlineBias, layer: str = "l") -> list[int]:
    return bias._counts(layer)


def test_the_golden_case_moves_the_busy_down_and_the_idle_up_and_is_centred(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=10, b=0, c=2))
    assert bias.step(10.0)
    # [-1e-3, +1e-3, +1e-3] before centring, and their mean is 1e-3 / 3.
    assert bias.biases["l"].values == pytest.approx((-4e-3 / 3, 2e-3 / 3, 2e-3 / 3))
    assert bias.biases["l"].num_steps == 1
    assert bias.biases["l"].num_assignments == 12
    assert bias.biases["l"].load_ratio == pytest.approx(2.5)
    assert bias.biases["l"].largest == pytest.approx(4e-3 / 3)


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), min_size=1, max_size=20))
def test_every_step_is_that_of_training(loads: list[list[int]]) -> None:
    kept, reference = LayerBias.at_zero(("a", "b", "c", "d", "e")), torch.zeros(5, dtype=torch.float64)
    for counts in loads:
        kept = kept.stepped(counts, rate=RATE)
        # In whole numbers: the mean of float32 counts may be rounded to one of them.
        signs = torch.sign(sum(counts) - len(counts) * torch.tensor(counts))
        reference = reference + RATE * signs
        reference = reference - reference.mean()
    assert torch.allclose(torch.tensor(kept.values, dtype=torch.float64), reference, atol=1e-9)
    assert sum(kept.values) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("counts", [[10, 0, 2], [4, 4, 4], [1, 2, 3], [0, 0, 9], [5, 7, 3]])
def test_a_step_is_that_of_the_formula_for_training(counts: list[int]) -> None:
    start = LayerBias(("a", "b", "c"), (0.25, -0.5, 0.25))
    expected = update_bias(torch.tensor(start.values), torch.tensor(counts), rate=RATE)
    assert torch.allclose(torch.tensor(start.stepped(counts, rate=RATE).values), expected, atol=1e-7)


def test_loads_of_all_routers_make_one_step(bias: OnlineBias) -> None:
    bias.take(1, said(8, a=0, b=0, c=0))
    bias.take(0, said(7, a=9, b=1, c=0))
    bias.take(1, said(8, a=0, b=1, c=9))
    assert counted(bias) == [9, 2, 9]
    bias.step(10.0)
    assert bias.biases["l"].values == pytest.approx((-2e-3 / 3, 4e-3 / 3, -2e-3 / 3))


def test_nothing_is_counted_twice_however_often_a_router_says_it(bias: OnlineBias) -> None:
    for _ in range(3):
        bias.take(0, said(7, a=5, b=1, c=0))
    bias.take(0, said(7, a=6, b=1, c=0))
    assert counted(bias) == [6, 1, 0]
    bias.step(10.0)
    bias.take(0, said(7, a=6, b=1, c=0))
    assert counted(bias) == [0, 0, 0]


def test_a_router_that_restarts_begins_at_zero(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=100, b=100, c=100))
    bias.take(0, said(9, a=3, b=0, c=200))
    assert counted(bias) == [103, 100, 300]
    bias.take(0, said(9, a=4, b=0, c=200))
    assert counted(bias) == [104, 100, 300]


def test_counts_that_go_back_count_for_nothing_until_they_grow_again(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=50, b=5, c=0))
    bias.take(0, said(7, a=20, b=6, c=0))
    assert counted(bias) == [50, 6, 0]
    bias.take(0, said(7, a=21, b=6, c=0))
    assert counted(bias) == [51, 6, 0]


def test_what_a_router_says_first_is_where_counting_begins(bias: OnlineBias) -> None:
    bias.take(1, said(8, a=1000, b=1000, c=1000))
    assert counted(bias) == [0, 0, 0]
    bias.take(1, said(8, a=1001, b=1000, c=1000))
    assert counted(bias) == [1, 0, 0]


def test_without_load_there_is_no_step(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=0, b=0, c=0))
    assert not bias.step(1000.0)
    assert bias.biases["l"] == LayerBias.at_zero(("a", "b", "c"))
    assert bias.describe()["l"]["load_ratio_since"] is None


def test_a_step_waits_for_its_time(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=5, b=0, c=0))
    assert not bias.step(9.9)
    assert bias.step(10.0)
    bias.take(0, said(7, a=10, b=0, c=0))
    assert not bias.step(19.9)
    assert bias.step(20.0)


def test_a_step_waits_for_enough_assignments() -> None:
    bias = OnlineBias()
    bias.follow({"l": rule("a", "b", min_assignments=10)})
    bias.step(0.0)
    bias.take(0, said(7, a=0, b=0))
    bias.take(0, said(7, a=9, b=0))
    assert not bias.step(50.0)
    bias.take(0, said(7, a=9, b=1))
    assert bias.step(51.0)
    assert bias.biases["l"].num_assignments == 10
    # The next interval begins with the step, not where this one would have been due.
    bias.take(0, said(7, a=90, b=1))
    assert not bias.step(60.0)
    assert bias.step(61.0)


def test_layers_move_each_by_its_own_rule() -> None:
    bias = OnlineBias()
    bias.follow({"slow": rule("a", "b", interval_s=10.0), "fast": rule("a", "b", interval_s=0.5)})
    assert bias.poll_every_s == 0.5
    bias.step(0.0)
    bias.take(0, AskedCounts(7, {"slow": {"a": 0, "b": 0}, "fast": {"a": 0, "b": 0}}))
    bias.take(0, AskedCounts(7, {"slow": {"a": 4, "b": 0}, "fast": {"a": 0, "b": 4}}))
    assert bias.step(1.0)
    assert {name: each.num_steps for name, each in bias.biases.items()} == {"slow": 0, "fast": 1}
    assert bias.biases["fast"].values == pytest.approx((RATE, -RATE))


def test_experts_of_one_name_keep_their_bias_and_a_new_one_begins_at_the_mean() -> None:
    bias = OnlineBias()
    bias.adopt({"l": LayerBias(("a", "b", "c"), (0.5, -0.25, -0.25), num_steps=4)})
    bias.follow({"l": rule("c", "new", "a")})
    # -0.25, 0 and 0.5, less their mean.
    assert bias.biases["l"].values == pytest.approx((-1 / 3, -1 / 12, 5 / 12))
    assert bias.biases["l"].experts == ("c", "new", "a")
    assert bias.biases["l"].num_steps == 4


def test_loads_of_other_experts_are_forgotten_with_them_but_not_where_nothing_changes(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=5, b=0, c=0))
    bias.follow({"l": rule()})
    assert counted(bias) == [5, 0, 0]
    bias.follow({"l": rule("a", "new")})
    assert counted(bias) == [0, 0]
    # The router has counted on, and from 0 for the new one.
    bias.take(0, said(7, a=6, new=3))
    assert counted(bias) == [1, 3]


def test_a_layer_that_is_balanced_no_longer_has_no_bias(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=5, b=0, c=0))
    bias.follow({})
    assert bias.biases == {}
    assert bias.describe() == {}
    bias.follow({"l": rule()})
    assert counted(bias) == [0, 0, 0]


def test_a_layer_that_is_balanced_from_now_on_is_counted_from_now_on() -> None:
    bias = OnlineBias()
    bias.follow({"l": rule("a", "b")})
    bias.take(0, said(7, a=0, b=0))
    bias.follow({"l": rule("a", "b"), "m": rule("x", "y")})
    bias.take(0, AskedCounts(7, {"l": {"a": 1, "b": 0}, "m": {"x": 500, "y": 600}}))
    assert (counted(bias, "l"), counted(bias, "m")) == ([1, 0], [0, 0])
    bias.take(0, AskedCounts(7, {"l": {"a": 1, "b": 0}, "m": {"x": 501, "y": 600}}))
    assert counted(bias, "m") == [1, 0]


def test_whoever_takes_over_goes_on_from_the_bias_and_counts_no_load_again(bias: OnlineBias) -> None:
    bias.take(0, said(7, a=10, b=0, c=2))
    bias.step(10.0)
    successor = OnlineBias()
    successor.adopt(bias.biases)
    successor.follow({"l": rule()})
    assert successor.biases == bias.biases
    successor.step(10.0)
    successor.take(0, said(7, a=11, b=0, c=2))
    assert not successor.step(30.0)
    successor.take(0, said(7, a=11, b=4, c=2))
    assert successor.step(31.0)
    assert successor.biases["l"].num_assignments == 12 + 4


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.lists(st.integers(0, 50), min_size=2, max_size=2)), max_size=40
    )
)
def test_no_assignment_is_counted_twice_whatever_routers_do(events: list[tuple[int, bool, list[int]]]) -> None:
    bias = OnlineBias()
    bias.follow({"l": rule("a", "b")})
    incarnations, totals, true = [10, 20, 30], [[0, 0] for _ in range(3)], [0, 0]
    for router in range(3):
        bias.take(router, said(incarnations[router], a=0, b=0))
    history = [counted(bias)]
    for router, restarts, new in events:
        if restarts:
            incarnations[router] += 1
            totals[router] = [0, 0]
        totals[router] = [total + more for total, more in zip(totals[router], new, strict=True)]
        true = [total + more for total, more in zip(true, new, strict=True)]
        bias.take(router, said(incarnations[router], a=totals[router][0], b=totals[router][1]))
        history.append(counted(bias))
    assert counted(bias) == true
    assert all(
        after >= before for earlier, later in pairwise(history) for before, after in zip(earlier, later, strict=True)
    )
