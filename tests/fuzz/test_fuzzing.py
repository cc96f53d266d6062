"""Strangers' bytes, by the thousand here and by the million in the soak test: no crash, no hang, no memory gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="fuzzing needs atheris, which has no build for this Python or system")

TESTS = Path(__file__).parents[1]
FUZZER = Path(__file__).with_name("fuzzer.py")
SECONDS_EACH = 15
#: One million in all.
NUM_INPUTS = {"wire": 500_000, "frames": 300_000, "sockets": 150_000, "grpc": 50_000}


def fuzz(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(FUZZER), name, str(folder), "-seed=5", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def num_inputs(run: subprocess.CompletedProcess[str]) -> int:
    found = re.search(r"number_of_executed_units: (\d+)", run.stderr)
    assert found, run.stderr[-3000:]
    return int(found[1])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", NUM_INPUTS)
def test_target_stands_whatever_arrives_for_a_quarter_of_a_minute(name: str, tmp_path: Path) -> None:
    run = fuzz(name, tmp_path, f"-max_total_time={SECONDS_EACH}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert num_inputs(run) > 200


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NUM_INPUTS)
def test_target_stands_whatever_arrives(name: str, tmp_path: Path) -> None:
    run = fuzz(name, tmp_path, f"-runs={NUM_INPUTS[name]}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert num_inputs(run) >= NUM_INPUTS[name]


def test_planted_mistake_is_found_and_its_input_is_kept(tmp_path: Path) -> None:
    run = fuzz("planted", tmp_path, "-max_total_time=30")
    assert run.returncode != 0
    assert "ValueError: planted" in run.stdout + run.stderr
    (found,) = tmp_path.glob("crash-*")
    assert found.read_bytes().startswith(b"moe")
