"""A short storm over a real cluster: everything is answered, accounted for and cleaned up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.chaos.schedule import FaultKind

PROGRAM = "from moe_runtime.cli import main; main()"


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own: with a Ray of its own, and nothing open that is not the run's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-uc", PROGRAM, "chaos", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.timeout(400)  # two Rays share the cores, and what is killed has to come back
def test_a_short_storm_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    with start("--minutes", "0.35", "--seed", "1", "--no-recovery", "--json", str(path)) as process:
        output, _ = process.communicate()
    assert path.exists(), output
    result = json.loads(path.read_text())
    assert [result[name] for name in ("num_wrong", "num_lost", "num_leaks")] == [0, 0, 0], output
    # `make chaos` has the machine to itself; here other tests take the cores, and an answer may be late.
    assert process.returncode == (1 if result["num_late"] else 0), output
    assert result["num_requests"] == result["num_ok"] + result["num_typed_errors"] + result["num_transport_errors"]
    assert result["num_ok"] > 100
    assert set(result["num_faults"]) <= set(FaultKind)
    assert sum(result["num_faults"].values()) >= 3
    assert result["num_kills"] >= 1
    assert sum(result["counters_compared"].values()) >= 1


@pytest.mark.timeout(400)
def test_an_interrupt_ends_the_storm_in_order_and_reports_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    with start("--minutes", "10", "--seed", "1", "--without", "poison_hang", "--json", str(path)) as process:
        assert process.stdout is not None
        storm = next(line for line in process.stdout if "Storm began" in line)
        assert storm
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    result = json.loads(path.read_text())
    assert result["was_stopped"] is True
    assert result["load_s"] < 60
    assert result["num_leaks"] == 0
