from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.bench import runner
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Sample
from moe_runtime.bench.suite import BenchSettings, Suite


def one_row(settings: BenchSettings) -> Iterator[Row]:
    settings.begin("Counting").update(1, 1)
    yield Row("one", {"rows": 1, "quick": settings.quick}, "peer", Sample((1.0,)), Sample((2.0,)))


ONE = Suite("one", "one row", one_row)
LACKING = Suite("lacking", "never", one_row, lambda: "expected something, found nothing")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(autouse=True)
def _suites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUITES", {"one": ONE, "lacking": LACKING})


def test_an_unknown_suite_is_named_with_those_that_exist(console: Console):
    with pytest.raises(BenchError, match="expected one of one, lacking, found 'two'"):
        runner.run(["two"], console=console)


def test_a_suite_that_lacks_something_says_what(console: Console):
    with pytest.raises(BenchError, match="suite lacking: expected something, found nothing"):
        runner.run(["lacking"], console=console)


def test_without_a_name_every_suite_runs_that_can(console: Console):
    rows = runner.run(console=console)
    assert [row.suite for row in rows] == ["one"]
    assert "suite lacking is left out" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_are_shown_and_written(console: Console, tmp_path: Path):
    path = tmp_path / "bench.json"
    runner.run(["one"], json_path=path, quick=True, console=console)
    assert json.loads(path.read_text())["rows"][0]["case"] == {"rows": 1, "quick": True}
    assert "0.50" in console.file.getvalue()  # type: ignore[attr-defined]
