"""The cheapest suite end to end: actors start, contenders take turns, rows come out; and actors are really lost."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.bench.faults import measure_faults
from moe_runtime.bench.runner import run
from moe_runtime.bench.suite import BenchSettings


class UnseenStage:
    def update(self, num_done: int, num_all: int) -> None:
        assert num_done <= num_all


@pytest.mark.timeout(180)  # two runtimes start, on whatever cores the other tests leave
def test_the_quick_scale_suite_compares_two_layouts(cluster: str, tmp_path: Path):
    path = tmp_path / "scale.json"
    rows = run(["scale"], json_path=path, quick=True, console=Console(file=io.StringIO(), width=200))
    assert [row.case["tokens"] for row in rows] == [16, 256]
    for row in rows:
        assert row.case["actors"] == 4
        assert row.figures["messages_per_batch"] == 4
        assert row.ratio > 0
    results = json.loads(path.read_text())
    assert {row["suite"] for row in results["rows"]} == {"scale"}
    assert results["runs"]["scale"]["quick"] is True


@pytest.mark.timeout(180)  # six actors start, on whatever cores the other tests leave
def test_killed_and_frozen_actors_are_known_to_routers_in_no_time(cluster: str):
    rows = list(measure_faults(BenchSettings(quick=True, begin=lambda title: UnseenStage())))
    assert [row.case for row in rows] == [
        {"fault": "killed"},
        {"fault": "killed", "encryption": "curve"},
        {"fault": "frozen"},
    ]
    killed, _, frozen = rows
    assert killed.figures["hosts_lost"] == 4
    assert "ActorDiedError" in killed.peer
    # The best of several: a busy machine may schedule a router late.
    assert min(killed.ours.times_ms) < 100
    assert frozen.ratio < 1
