"""Bad experts and bad rows: what each costs, and what it must not cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_runtime.experts.build import LoadedExpert
from moe_runtime.experts.golden_probe import GoldenProbe
from moe_runtime.experts.host import ExpertCall, ExpertHost
from moe_runtime.experts.protocol import ExpertContract
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.view import resolve_view

POISON = 13.0
PROBE = GoldenProbe(torch.ones(1, 2), torch.full((1, 2), 10.0))


class Recorded(nn.Module):
    """A real module around a function of the rows, which notes how many rows each forward had."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.contract = ExpertContract((2,), (2,))
        self.function = function
        self.num_rows: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.num_rows.append(rows.shape[0])
        return self.function(rows)


def loaded(function: Callable[[Tensor], Tensor], *, probe: GoldenProbe | None = None) -> LoadedExpert:
    module = Recorded(function)
    spec = ExpertSpec("toy", 0, "toy-0", "identity", (2,))
    return LoadedExpert(spec, module, module.contract, resolve_view((2,), None), "seed:0", probe)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, 2).contiguous()


def ten_times(given: Tensor) -> Tensor:
    return given * 10


def refuse_poison(given: Tensor) -> Tensor:
    if bool((given == POISON).any()):
        raise ValueError("poison")
    return given * 10


def always_raise(given: Tensor) -> Tensor:
    raise ValueError("always")


def first_column(rows: Tensor | None) -> list[float]:
    assert rows is not None
    return rows[:, 0].tolist()


def test_the_row_that_makes_a_forward_raise_fails_alone() -> None:
    expert = loaded(refuse_poison)
    (outcome,) = ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, 2, POISON, 4))])
    assert first_column(outcome.rows) == [10, 20, 0, 40]
    assert outcome.failed_rows == (2,)
    assert outcome.error == "a: the expert raised ValueError: poison, in 1 of 4 rows"
    assert expert.module.num_rows == [4, 2, 2, 1, 1]


def test_rows_of_other_calls_are_served_although_they_were_in_the_forward_that_raised() -> None:
    sizes = [3, 1, 4, 2]
    calls = [ExpertCall("a", torch.ones(size, 2)) for size in sizes]
    calls[2].rows[1] = POISON
    outcomes = ExpertHost({"a": loaded(refuse_poison)}).run(calls)
    assert [outcome.failed_rows for outcome in outcomes] == [(), (), (1,), ()]
    assert [outcome.error is None for outcome in outcomes] == [True, True, False, True]
    assert [first_column(outcome.rows) for outcome in outcomes] == [[10] * 3, [10], [10, 0, 10, 10], [10] * 2]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    poisoned=st.sets(st.integers(0, 71), max_size=2),
    spoiled=st.sets(st.integers(0, 71), max_size=3),
)
def test_exactly_the_bad_rows_fail_and_all_others_are_right(
    sizes: list[int], poisoned: set[int], spoiled: set[int]
) -> None:
    given = torch.arange(2.0 * sum(sizes)).reshape(-1, 2) + 100
    poisoned, spoiled = ({row for row in chosen if row < len(given)} for chosen in (poisoned, spoiled))
    given[sorted(spoiled)] = 3e38
    given[sorted(poisoned)] = POISON
    outcomes = ExpertHost({"a": loaded(refuse_poison)}).run([ExpertCall("a", part) for part in given.split(sizes)])
    start = 0
    for size, outcome in zip(sizes, outcomes, strict=True):
        bad = {row - start for row in poisoned | spoiled if start <= row < start + size}
        if size and len(bad) == size:
            assert (outcome.rows, outcome.failed_rows) == (None, ())
        else:
            expected = given[start : start + size] * 10
            expected[sorted(bad)] = 0
            assert outcome.rows is not None
            assert torch.equal(outcome.rows, expected)
            assert outcome.failed_rows == tuple(sorted(bad))
        assert (outcome.error is None) == (not bad)
        start += size


def test_an_expert_that_always_raises_does_not_cost_a_forward_per_row() -> None:
    expert = loaded(always_raise)
    calls = [ExpertCall("a", torch.ones(16, 2)) for _ in range(64)]
    outcomes = ExpertHost({"a": expert}).run(calls)
    assert {(outcome.rows, outcome.error) for outcome in outcomes} == {
        (None, "a: the expert raised ValueError: always")
    }
    # 1024 rows: at most 4 * 10 + 16 more.
    assert len(expert.module.num_rows) == 1 + 56


def test_the_search_serves_the_largest_pieces_first_and_ends_when_nobody_waits() -> None:
    given = torch.ones(8, 2)
    given[7] = POISON
    expert = loaded(refuse_poison)
    host = ExpertHost({"a": expert})
    late = iter([False, True])
    (outcome,) = host.finish(host.begin([ExpertCall("a", given)]), is_late=lambda: next(late, True))
    assert expert.module.num_rows == [8, 4, 4]
    assert outcome.failed_rows == (4, 5, 6, 7)
    assert first_column(outcome.rows) == [10] * 4 + [0] * 4


def test_a_call_of_an_exact_expert_that_raises_fails_as_a_whole() -> None:
    expert = loaded(refuse_poison)
    expert = replace(expert, spec=replace(expert.spec, exact=True))
    bad, good = ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, POISON)), ExpertCall("a", rows(2))])
    assert (bad.rows, bad.error) == (None, "a: the expert raised ValueError: poison")
    assert first_column(good.rows) == [20]
    assert expert.module.num_rows == [2, 1]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit("gone"), MemoryError("none left")])
def test_whatever_an_expert_raises_is_its_error(error: BaseException) -> None:
    def leave(given: Tensor) -> Tensor:
        raise error

    bad, good = ExpertHost({"a": loaded(leave), "b": loaded(ten_times)}).run(
        [ExpertCall("a", rows(1)), ExpertCall("b", rows(2))]
    )
    assert bad.error is not None
    assert bad.error.startswith(f"a: the expert raised {type(error).__name__}")
    assert first_column(good.rows) == [20]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda given: None, "a: expected a tensor as output, found NoneType"),
        (lambda given: given[1:], "a: expected output of shape [3, 2], found [2, 2]"),
        (lambda given: given[:, :1], "a: expected output of shape [3, 2], found [3, 1]"),
        (lambda given: given.double(), "a: expected output of dtype torch.float32, found torch.float64"),
    ],
)
def test_wrong_output_fails_the_whole_call_and_counts_as_a_fault(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    expert = loaded(function)
    host = ExpertHost({"a": expert, "b": loaded(ten_times)})
    bad, good = host.run([ExpertCall("a", rows(1, 2, 3)), ExpertCall("b", rows(1))])
    assert (bad.rows, bad.error, bad.failed_rows) == (None, message, ())
    assert first_column(good.rows) == [10]
    assert host.num_faults() == {"a": 1}
    assert expert.module.num_rows == [3]


def test_wrong_output_costs_the_calls_that_cause_it_not_those_beside_them() -> None:
    def forget_poison(given: Tensor) -> Tensor:
        return given[given[:, 0] != POISON] * 10

    host = ExpertHost({"a": loaded(forget_poison)})
    good, bad, also_good = host.run(
        [ExpertCall("a", rows(1)), ExpertCall("a", rows(POISON, 2)), ExpertCall("a", rows(3))]
    )
    assert (first_column(good.rows), first_column(also_good.rows)) == ([10], [30])
    assert (bad.rows, bad.failed_rows) == (None, ())
    assert host.num_faults()["a"] >= 1


def test_raising_is_no_fault() -> None:
    host = ExpertHost({"a": loaded(refuse_poison)})
    host.run([ExpertCall("a", rows(1, POISON))])
    assert host.num_faults() == {}


def test_rows_that_share_memory_with_the_call_are_not_zeroed_in_place() -> None:
    def spoil_last(given: Tensor) -> Tensor:
        return given / given * given

    given = rows(1, 0)
    (outcome,) = ExpertHost({"a": loaded(spoil_last)}).run([ExpertCall("a", given)])
    assert outcome.failed_rows == (1,)
    assert first_column(given) == [1, 0]


class Drifting:
    """Ten times the rows, until it is broken."""

    def __init__(self) -> None:
        self.factor = 10.0

    def __call__(self, given: Tensor) -> Tensor:
        return given * self.factor


def test_a_client_that_sends_huge_values_does_not_make_the_host_unfit() -> None:
    host = ExpertHost({"a": loaded(ten_times, probe=PROBE)})
    (outcome,) = host.run([ExpertCall("a", rows(3e38))])
    assert outcome.error is not None
    assert host.unfit is None


def test_a_host_whose_golden_probe_fails_after_a_bad_answer_is_unfit_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drifting = Drifting()
    seconds = count(100.0, 10.0)
    host = ExpertHost({"a": loaded(drifting, probe=PROBE)}, now=lambda: next(seconds))
    drifting.factor = float("nan")
    host.run([ExpertCall("a", rows(1))])
    reason = "a: its golden probe differs by nan, expected at most 0.01"
    assert host.unfit == reason
    assert reason in caplog.text
    drifting.factor = 10.0
    host.run([ExpertCall("a", rows(3e38))])
    assert host.unfit == reason


def test_wrong_output_is_a_reason_to_ask_the_golden_probe_too() -> None:
    host = ExpertHost({"a": loaded(lambda given: None, probe=PROBE)})
    host.run([ExpertCall("a", rows(1))])
    assert host.unfit == "a: its golden probe gave NoneType, expected [1, 2] of torch.float32"


def test_good_answers_never_run_the_golden_probe() -> None:
    expert = loaded(ten_times, probe=PROBE)
    ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, 2))])
    assert expert.module.num_rows == [2]


def test_the_golden_probe_runs_once_a_second_at_most() -> None:
    class Clock:
        time = 5.0

    expert = loaded(ten_times, probe=PROBE)
    host = ExpertHost({"a": expert}, now=lambda: Clock.time)
    for _ in range(3):
        host.run([ExpertCall("a", rows(3e38))])
    assert expert.module.num_rows == [1, 1, 1, 1]
    Clock.time += 1.0
    host.run([ExpertCall("a", rows(3e38))])
    assert expert.module.num_rows == [1] * 6


def test_an_expert_that_raises_all_the_time_is_logged_in_full_once_a_second_at_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = ExpertHost({"a": loaded(always_raise)}, now=lambda: 7.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            host.run([ExpertCall("a", rows(1))])
    assert [record.getMessage() for record in caplog.records] == ["a: the expert raised ValueError: always"]
    assert caplog.records[0].exc_info is not None


def test_counters_tell_calls_rows_forwards_and_time() -> None:
    seconds = count(0.0, 0.5)
    host = ExpertHost({"a": loaded(ten_times), "b": loaded(ten_times)}, now=lambda: next(seconds))
    host.run([ExpertCall("a", rows(1, 2)), ExpertCall("a", rows(3))])
    host.note_wait("a", 0.25)
    host.note_wait("nobody", 1.0)
    a, b = host.experts["a"], host.experts["b"]
    assert (a.num_calls, a.num_rows, a.num_forwards, a.num_faults) == (2, 3, 1, 0)
    assert (a.compute_ms, a.queue_s) == (500.0, 0.25)
    assert b.num_calls == 0
