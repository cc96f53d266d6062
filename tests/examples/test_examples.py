import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Ray's start takes a few seconds, and many more on a machine that is busy with other things.
ray_example = pytest.mark.timeout(240)


def run(name: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent, timeout=220)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@ray_example
def test_serve_and_call_shows_actors_of_their_own_and_a_report_that_adds_up() -> None:
    lines = run("01_serve_and_call.py")

    processes = [match[1] for line in lines if (match := re.search(r": ready, process (\d+) on ", line))]
    assert len(set(processes)) == 3
    assert "outputs: (32, 10) float32" in lines
    [counts] = [re.findall(r"\d+", line) for line in lines if line.startswith("assignments: ")]
    asked, *ends = map(int, counts)
    assert asked == 64 == sum(ends)


def test_the_async_client_has_its_requests_joined() -> None:
    assert run("02_async_client.py")[0] == "16 requests answered, 136 tokens"


def test_a_custom_expert_is_served_and_its_options_are_checked() -> None:
    assert entry_points(group="moe_runtime.experts", name="fourier"), "`make venv` installs the plug-in"
    refused, served = run("03_custom_expert.py")

    assert refused.startswith("refused: layers.mixed.experts.0.options.num_featurs: ")
    assert "num_features" in refused
    assert served == "served by fourier and feed_forward: (5, 4)"


@ray_example
def test_a_killed_expert_costs_its_own_assignments_and_comes_back() -> None:
    lines = [line for line in run("04_failures.py") if "raylet" not in line]

    assert lines[0] == "three experts: 0 of 24 assignments failed"
    assert lines[1] == "killed mlp-1: 8 of 24 assignments failed, the other 16 were answered"
    assert lines[2] == "restarted: 0 of 24 assignments failed"
    assert [line.partition(":")[0] for line in lines[3:]] == ["ShapeError", "DTypeError", "NonFiniteError"]


def test_layers_within_layers_are_served_and_a_runtime_that_goes_away_is_one_expert_s_failure() -> None:
    served, *versions, without, warning, refused = run("05_nested.py")

    assert served == "outputs: (8, 10), 24 of 24 assignments served"
    assert versions == ["feed_forward-0: seed:0", "near: moe:inner", "far: remote:FAR/far"]
    assert without == "without the far one: 16 of 24 assignments served"
    assert warning == "expert far: its inner layer gave no answer"
    assert refused.endswith("found the cycle outer -> inner -> outer")


def test_every_numbered_example_is_run_here() -> None:
    tested = set(re.findall(r'run\("(\d\d_\w+\.py)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.name for path in EXAMPLES.glob("[0-9]*.py")}


@ray_example
def test_a_hugging_face_model_has_its_experts_in_actors_and_says_the_same() -> None:
    lines = run("06_hugging_face.py")

    here, all_of_them = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", lines[0]))
    assert all_of_them - here == 3 * 4 * 3 * 64 * 128, "layers, experts, matrices of an expert"
    assert lines[1].endswith(", the same in one process")
    assert lines[2] == "actors: 2"
    # 4 tokens of the prompt and 11 of the 12 that follow, two experts each, in every layer.
    assert [sum(map(int, re.findall(r"\d+", line.partition("[")[2]))) for line in lines[3:]] == [2 * 15] * 3
