"""The demo of routers from its first line to its last; experts and router are threads of this process."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.recipe import Recipe
from moe_runtime.demos.digits.training import DigitsLayer
from moe_runtime.demos.errors import DemoError
from moe_runtime.demos.routers import RoutersResult, run
from moe_runtime.demos.routers.policies import POLICIES
from moe_runtime.demos.routers.render import show_result

# Some of these train for real, on machines that may have other things to do.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def outcome(
    short_recipe: Recipe, trained: DigitsLayer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RoutersResult, str, Path]:
    """The result of one run, what it showed, and the JSON file that it wrote."""
    folder = tmp_path_factory.mktemp("routers")
    console = Console(file=io.StringIO(), width=100, highlight=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_RUNTIME_CACHE", str(folder / "cache"))
        artifacts.save(trained, short_recipe, artifacts.folder_of(short_recipe))
        result = run(json_path=folder / "result.json", console=console, recipe=short_recipe, ray=False)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue(), folder / "result.json"


@pytest.fixture
def result(outcome: tuple[RoutersResult, str, Path]) -> RoutersResult:
    return outcome[0]


def test_every_policy_routes_the_same_images(result: RoutersResult) -> None:
    assert [policy.name for policy in result.policies] == [policy.name for policy in POLICIES]
    assert result.num_images == 450
    assert max(policy.max_difference for policy in result.policies) <= 1e-5
    by_name = {policy.name: policy for policy in result.policies}
    dense = by_name["dense"]
    assert (dense.loads, dense.agreement, dense.mean_difference, dense.num_dropped) == ((450,) * 5, 1.0, 0.0, 0)
    assert [sum(by_name[name].loads) for name in ("top_k", "switch", "hash", "expert_choice")] == [900, 450, 900, 900]
    assert by_name["global_assignment"].loads == (90,) * 5
    assert by_name["round_robin"].loads == by_name["expert_choice"].loads == (180,) * 5
    assert by_name["top_k, bias"].max_over_mean <= by_name["top_k"].max_over_mean
    assert min(policy.accuracy + policy.num_unserved / 450 for policy in result.policies) > 0.9


def test_what_was_found_is_shown_and_written(outcome: tuple[RoutersResult, str, Path]) -> None:
    result, text, path = outcome
    written = json.loads(path.read_text())

    assert [policy["accuracy"] for policy in written["policies"]] == [policy.accuracy for policy in result.policies]
    assert written["policies"][0]["max_over_mean"] == 1.0
    for word in (
        "Training",
        "done before",
        "Rolling",
        "expert_choice",
        "max÷mean",
        "as dense",
        "threads of this process",
    ):
        assert word in text


def test_the_table_keeps_its_lines_whole_in_a_hundred_columns(result: RoutersResult) -> None:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show_result(console, result)
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue().partition("\nloads ")[0]

    assert len(table.strip().splitlines()) == 1 + len(POLICIES)
    assert "…" not in table


@pytest.mark.parametrize("difference", [1.1e-5, float("nan")])
def test_a_policy_whose_answers_differ_from_its_experts_fails_the_demo(
    difference: float, result: RoutersResult
) -> None:
    first, second, *rest = result.policies
    wrong = replace(result, policies=(first, replace(second, max_difference=difference), *rest))

    with pytest.raises(DemoError, match="top_k: expected answers within 1e-05 of what its experts"):
        wrong.check()


def test_too_many_errors_with_all_experts_fail_the_demo(result: RoutersResult) -> None:
    dense, *rest = result.policies

    with pytest.raises(DemoError, match=r"at least 96% with all experts, found 95\.90%"):
        replace(result, policies=(replace(dense, accuracy=0.959), *rest)).check()


def test_a_folder_that_is_not_there_is_found_out_before_the_work(short_recipe: Recipe, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(DemoError, match=r"--json .*expected an existing folder"):
        run(json_path=tmp_path / "absent" / "result.json", console=console, recipe=short_recipe, ray=False)
