"""The cheapest suite end to end: actors start, contenders take turns, rows come out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.bench.runner import run


@pytest.mark.timeout(180)  # two runtimes start, on whatever cores the other tests leave
def test_the_quick_scale_suite_compares_two_layouts(cluster: str, tmp_path: Path):
    path = tmp_path / "scale.json"
    rows = run(["scale"], json_path=path, quick=True, console=Console(file=io.StringIO(), width=200))
    assert [row.case["tokens"] for row in rows] == [16, 256]
    for row in rows:
        assert row.case["actors"] == 4
        assert row.figures["messages_per_batch"] == 4
        assert row.ratio > 0
    assert {row["suite"] for row in json.loads(path.read_text())["rows"]} == {"scale"}
