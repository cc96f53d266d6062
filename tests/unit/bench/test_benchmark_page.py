from __future__ import annotations

from pathlib import Path

import pytest

from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.page import PAGE, figure_table, machine_table, write_page
from moe_runtime.bench.suites import SUITES

ROW = {
    "suite": "exchange",
    "case": {"rows": 16},
    "ours_ms": 1.0,
    "ours_spread_ms": [0.9, 1.2],
    "peer": "zmq echo",
    "peer_ms": 2.0,
    "peer_spread_ms": [1.5, 2.5],
    "ratio": 0.5,
    "figures": {"p99_ms": 3.0},
}


def test_a_suite_becomes_a_table_of_medians_ratios_and_figures():
    assert figure_table([ROW]).splitlines() == [
        "| rows | ours ms | peer | peer ms | ours ÷ peer | p99 ms |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 16 | 1 (0.9-1.2) | zmq echo | 2 (1.5-2.5) | **0.50** | 3 |",
    ]


def test_figures_replace_those_of_the_run_before(tmp_path: Path):
    place = "<!-- figures: {} -->\nold\n<!-- end -->"
    (tmp_path / PAGE).write_text(f"before\n{place.format('machine')}\n{place.format('skew')}\nafter\n")
    write_page({"machine": {"cores": 2}, "rows": [{**ROW, "suite": "skew"}]}, tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "old" not in page
    assert machine_table({"cores": 2}) in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")


def test_a_page_without_a_place_for_a_suite_is_an_error(tmp_path: Path):
    (tmp_path / PAGE).write_text("nothing\n")
    with pytest.raises(BenchError, match="expected a place for machine"):
        write_page({"machine": {}, "rows": []}, tmp_path)


def test_the_page_of_this_repository_has_a_place_for_every_suite():
    page = (Path(__file__).parents[3] / "docs" / PAGE).read_text()
    for name in ["machine", *SUITES]:
        assert f"<!-- figures: {name} -->" in page
