"""The host: merged forwards, and errors that stay with whoever caused them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_runtime.config.experts import ViewConfig
from moe_runtime.experts.build import LoadedExpert, build_expert
from moe_runtime.experts.host import MAX_MERGED_ROWS, ExpertCall, ExpertHost
from moe_runtime.experts.protocol import ExpertContract
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.view import resolve_view


class Recorded(nn.Module):
    """A real module around a function of the rows, which notes how many rows each forward had."""

    def __init__(self, function: Callable[[Tensor], Tensor], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.contract = ExpertContract((2,), out_shape)
        self.function = function
        self.num_rows: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.num_rows.append(rows.shape[0])
        return self.function(rows)


def loaded(
    function: Callable[[Tensor], Tensor], *, out_shape: tuple[int, ...] = (2,), view: ViewConfig | None = None
) -> LoadedExpert:
    spec = ExpertSpec("toy", 0, "toy-0", "identity", (2,), view=view)
    module = Recorded(function, out_shape)
    return LoadedExpert(spec, module, module.contract, resolve_view((2,), view), "seed:0")


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, 2).contiguous()


def refuse_negative(given: Tensor) -> Tensor:
    if bool((given < 0).any()):
        raise ValueError("negative row")
    return given * 10


def test_calls_for_one_replica_become_one_forward_and_come_back_apart() -> None:
    expert = loaded(lambda given: given * 10)
    outcomes = ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, 2)), ExpertCall("a", rows(3))])
    assert [outcome.rows.tolist() for outcome in outcomes if outcome.rows is not None] == [
        [[10, 10], [20, 20]],
        [[30, 30]],
    ]
    assert expert.module.num_rows == [3]


def test_calls_for_several_replicas_are_answered_in_the_order_of_the_calls() -> None:
    ten, hundred = loaded(lambda given: given * 10), loaded(lambda given: given * 100)
    host = ExpertHost({"ten": ten, "hundred": hundred})
    calls = [ExpertCall("ten", rows(1)), ExpertCall("hundred", rows(2)), ExpertCall("ten", rows(3))]
    assert [outcome.rows[0, 0].item() for outcome in host.run(calls) if outcome.rows is not None] == [10, 200, 30]
    assert (ten.module.num_rows, hundred.module.num_rows) == ([2], [1])


def test_merging_stops_at_the_limit_and_never_splits_a_call() -> None:
    expert = loaded(lambda given: given)
    sizes = [MAX_MERGED_ROWS - 1, 1, 1, MAX_MERGED_ROWS + 5, 2]
    outcomes = ExpertHost({"a": expert}).run([ExpertCall("a", torch.zeros(size, 2)) for size in sizes])
    assert [len(outcome.rows) for outcome in outcomes if outcome.rows is not None] == sizes
    assert expert.module.num_rows == [MAX_MERGED_ROWS, 1, MAX_MERGED_ROWS + 5, 2]


def test_call_that_makes_the_merged_forward_raise_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    host = ExpertHost({"a": loaded(refuse_negative)})
    with caplog.at_level(logging.WARNING):
        good, bad, also_good = host.run([ExpertCall("a", rows(value)) for value in (1, -1, 2)])
    assert good.rows is not None
    assert good.rows.tolist() == [[10, 10]]
    assert also_good.rows is not None
    assert also_good.rows.tolist() == [[20, 20]]
    assert (bad.rows, bad.error) == (None, "a: the expert raised ValueError: negative row")
    assert "negative row" in caplog.text


def test_expert_that_raises_does_not_touch_the_others() -> None:
    host = ExpertHost({"bad": loaded(refuse_negative), "good": loaded(lambda given: given + 1)})
    bad, good = host.run([ExpertCall("bad", rows(-1)), ExpertCall("good", rows(-1))])
    assert bad.error is not None
    assert good.rows is not None
    assert good.rows.tolist() == [[0, 0]]


def test_non_finite_output_costs_only_the_rows_that_have_it() -> None:
    host = ExpertHost({"a": loaded(lambda given: 1 / given)})
    good, mixed, bad = host.run([ExpertCall("a", rows(2)), ExpertCall("a", rows(1, 0, 4)), ExpertCall("a", rows(0))])
    assert good.rows is not None
    assert good.rows.tolist() == [[0.5, 0.5]]
    assert mixed.rows is not None
    assert mixed.rows.tolist() == [[1, 1], [0, 0], [0.25, 0.25]]
    assert mixed.failed_rows == (1,)
    assert mixed.error == "a: expected finite outputs, found NaN or infinity, in 1 of 3 rows"
    assert (bad.rows, bad.failed_rows) == (None, ())
    assert bad.error == "a: expected finite outputs, found NaN or infinity"


def test_non_finite_output_of_a_non_finite_input_is_not_the_experts_fault() -> None:
    host = ExpertHost({"a": loaded(lambda given: given * 10)})
    (outcome,) = host.run([ExpertCall("a", rows(float("inf"), 1))])
    assert outcome.rows is not None
    assert outcome.rows.tolist() == [[float("inf")] * 2, [10, 10]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda given: given[:1], "a: expected output of shape [2, 2], found [1, 2]"),
        (lambda given: given[:, :1], "a: expected output of shape [2, 2], found [2, 1]"),
        (lambda given: given.half(), "a: expected output of dtype torch.float32, found torch.float16"),
        (lambda given: [given], "a: expected a tensor as output, found list"),
    ],
)
def test_output_that_breaks_the_contract_is_an_error(function: Callable[[Tensor], Tensor], message: str) -> None:
    (outcome,) = ExpertHost({"a": loaded(function)}).run([ExpertCall("a", rows(1, 2))])
    assert (outcome.rows, outcome.error) == (None, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (ExpertCall("b", rows(1)), "b: expected one of this host's replicas (a)"),
        (ExpertCall("a", torch.zeros(3, 5)), "a: expected rows of shape [2], found [5]"),
        (ExpertCall("a", torch.zeros(2, 2, dtype=torch.int64)), "a: expected rows of dtype torch.float32, found"),
        (ExpertCall("a", torch.tensor(1.0)), "a: expected rows of shape [2], found []"),
    ],
)
def test_wrong_call_is_an_error_and_the_one_beside_it_is_served(call: ExpertCall, message: str) -> None:
    wrong, right = ExpertHost({"a": loaded(lambda given: given)}).run([call, ExpertCall("a", rows(1))])
    assert wrong.error is not None
    assert wrong.error.startswith(message)
    assert right.rows is not None


def test_call_without_rows_gets_no_rows_and_runs_nothing() -> None:
    expert = loaded(lambda given: given, out_shape=(7,))
    (outcome,) = ExpertHost({"a": expert}).run([ExpertCall("a", torch.zeros(0, 2))])
    assert outcome.rows is not None
    assert outcome.rows.shape == (0, 7)
    assert expert.module.num_rows == []


def test_no_calls_give_no_outcomes() -> None:
    assert ExpertHost({}).run([]) == []


def test_expert_sees_its_view_of_the_full_row() -> None:
    expert = loaded(lambda given: given * 10, out_shape=(1,), view=ViewConfig(columns=(1, 2)))
    (outcome,) = ExpertHost({"a": expert}).run([ExpertCall("a", torch.tensor([[1.0, 2.0]]))])
    assert outcome.rows is not None
    assert outcome.rows.tolist() == [[20]]


def test_no_gradient_is_recorded_and_outputs_are_contiguous() -> None:
    spec = ExpertSpec("toy", 0, "toy-0", "constant", (2,), options={"out_shape": [3]})
    (outcome,) = ExpertHost({"a": build_expert(spec)}).run([ExpertCall("a", rows(1, 2))])
    assert outcome.rows is not None
    assert not outcome.rows.requires_grad
    assert outcome.rows.is_contiguous()


def test_merged_calls_all_report_the_time_of_their_product() -> None:
    seconds = count(start=100.0, step=0.25)
    host = ExpertHost({"a": loaded(lambda given: given)}, now=lambda: next(seconds))
    outcomes = host.run([ExpertCall("a", rows(1)), ExpertCall("a", rows(2))])
    assert [outcome.compute_ms for outcome in outcomes] == [250.0, 250.0]


SWIGLU_EXPERT = build_expert(ExpertSpec("toy", 0, "toy-0", "swiglu", (2,), options={"hidden_features": 8}))


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0, 1000))
def test_merging_changes_no_result(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, 2, generator=generator) for size in sizes]
    host = ExpertHost({"a": SWIGLU_EXPERT})
    merged = host.run([ExpertCall("a", part) for part in parts])
    alone = [host.run([ExpertCall("a", part)])[0] for part in parts]
    for one, other in zip(merged, alone, strict=True):
        torch.testing.assert_close(one.rows, other.rows, rtol=1e-5, atol=1e-6)


def test_calls_for_an_exact_expert_are_never_merged() -> None:
    expert = loaded(lambda given: given * 10)
    expert = replace(expert, spec=replace(expert.spec, exact=True))
    outcomes = ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, 2)), ExpertCall("a", rows(3))])
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert cast("Recorded", expert.module).num_rows == [2, 1]


def test_rows_travel_in_the_wires_dtype_and_are_computed_in_the_layers() -> None:
    seen: list[torch.dtype] = []

    def note(given: Tensor) -> Tensor:
        seen.append(given.dtype)
        return given * 10

    expert = loaded(note)
    expert = replace(expert, spec=replace(expert.spec, wire_dtype="bfloat16"))
    host = ExpertHost({"a": expert})
    (outcome,) = host.run([ExpertCall("a", rows(1, 2).bfloat16())])
    assert seen == [torch.float32]
    assert outcome.rows is not None
    assert outcome.rows.dtype == torch.bfloat16
    (refused,) = host.run([ExpertCall("a", rows(1, 2))])
    assert refused.error == "a: expected rows of dtype torch.bfloat16, found torch.float32"


def test_an_output_that_overflows_the_wires_dtype_is_an_error_not_an_infinity() -> None:
    expert = loaded(lambda given: given * 1e5)
    expert = replace(expert, spec=replace(expert.spec, wire_dtype="float16"))
    (outcome,) = ExpertHost({"a": expert}).run([ExpertCall("a", rows(1, 2).half())])
    assert outcome.rows is None
    assert outcome.error is not None
    assert "expected finite outputs" in outcome.error


def test_an_expert_that_ends_the_process_costs_only_its_calls() -> None:
    def leave(_: Tensor) -> Tensor:
        raise SystemExit(1)

    host = ExpertHost({"a": loaded(leave), "b": loaded(lambda given: given)})
    bad, good = host.run([ExpertCall("a", rows(1)), ExpertCall("b", rows(2))])
    assert (bad.rows, bad.error) == (None, "a: the expert raised SystemExit: 1")
    assert good.rows is not None


def test_experts_run_in_inference_mode_whether_or_not_their_thread_is_in_it() -> None:
    modes: list[bool] = []

    def note(given: Tensor) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return given

    host = ExpertHost({"a": loaded(note)})
    host.run([ExpertCall("a", rows(1))])
    with torch.inference_mode():
        host.run([ExpertCall("a", rows(1))])
    assert modes == [True, True]
    assert not torch.is_inference_mode_enabled()


def test_a_call_alone_that_needs_no_conversion_reaches_the_expert_as_it_is() -> None:
    seen: list[int] = []

    def note(given: Tensor) -> Tensor:
        seen.append(given.data_ptr())
        return given

    given = rows(1, 2)
    (outcome,) = ExpertHost({"a": loaded(note)}).run([ExpertCall("a", given)])
    assert outcome.rows is not None
    assert seen == [given.data_ptr()] == [outcome.rows.data_ptr()]
