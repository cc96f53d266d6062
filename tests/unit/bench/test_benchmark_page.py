from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.page import EXACTNESS_PAGE, PAGE, SuiteResults, load_results, write_pages
from moe_runtime.bench.suites import SUITES
from moe_runtime.bench.tables import figure_table, figure_tables, machine_table, wire_error_table

DOCS = Path(__file__).parents[3] / "docs"
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
PLACE = "<!-- figures: {} -->\nold\n<!-- end -->"
RUN = {"date": "2026-05-04T10:00:00+00:00", "quick": False, "seconds": 61.4, "commit": "abc"}


def page_with(*names: str) -> str:
    return "\nby hand\n".join(["before", *(PLACE.format(name) for name in names), "after\n"])


def write_results(folder: Path, name: str, *rows: dict[str, Any], date: str = "") -> None:
    runs = {row["suite"]: {**RUN, "date": date} for row in rows}
    (folder / name).write_text(json.dumps({"machine": {"cpu": "Z80", "cores": 2}, "runs": runs, "rows": list(rows)}))


def test_a_suite_becomes_a_table_of_medians_ratios_and_figures():
    assert figure_table([ROW]).splitlines() == [
        "| rows | ours ms | peer | peer ms | ours ÷ peer | p99 ms |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 16 | 1 (0.9-1.2) | zmq echo | 2 (1.5-2.5) | **0.50** | 3 |",
    ]


def test_cases_of_another_sort_get_a_table_of_their_own():
    fault = {**ROW, "case": {"fault": "killed"}, "figures": {}}
    first, second = figure_tables([ROW, fault, ROW]).split("\n\n")
    assert first == figure_table([ROW, ROW])
    assert second == figure_table([fault])


def test_figures_replace_those_of_the_run_before_and_nothing_written_by_hand(tmp_path: Path):
    (tmp_path / PAGE).write_text(page_with("machine", "skew", "scale", "aims"))
    results = SuiteResults([{**ROW, "suite": "skew"}], {"cpu": "Z80", "cores": 2, "commit": "abc"}, RUN)
    write_pages({"skew": results}, tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert machine_table({"cpu": "Z80", "cores": 2}) in page
    assert "*Full run of 2026-05-04, 61 s, commit `abc`, Z80, 2 cores.*" in page
    assert page.count("by hand") == 5
    assert PLACE.format("scale") in page
    assert page.count("old") == 1
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")


def test_writing_the_same_figures_again_changes_nothing(tmp_path: Path):
    (tmp_path / PAGE).write_text(page_with("machine", "skew", "aims"))
    results = {"skew": SuiteResults([{**ROW, "suite": "skew"}], {"cores": 2}, RUN)}
    write_pages(results, tmp_path)
    once = (tmp_path / PAGE).read_text()
    write_pages(results, tmp_path)
    assert (tmp_path / PAGE).read_text() == once


def test_the_newest_results_of_each_suite_are_taken_from_all_files_of_a_folder(tmp_path: Path):
    write_results(tmp_path, "a.json", {**ROW, "ratio": 0.1}, date="2026-05-04T10:00:00+00:00")
    write_results(tmp_path, "b.json", {**ROW, "ratio": 0.2}, date="2026-05-03T10:00:00+00:00")
    write_results(tmp_path, "c.json", {**ROW, "suite": "skew"})
    results = load_results(tmp_path)
    assert sorted(results) == ["exchange", "skew"]
    assert [row["ratio"] for row in results["exchange"].rows] == [0.1]


def test_a_folder_without_results_is_an_error(tmp_path: Path):
    with pytest.raises(BenchError, match="expected results of benchmarks, found none"):
        load_results(tmp_path)


def test_a_page_without_a_place_for_a_suite_is_an_error(tmp_path: Path):
    (tmp_path / PAGE).write_text("nothing\n")
    with pytest.raises(BenchError, match="expected a place for machine"):
        write_pages({"skew": SuiteResults([], {})}, tmp_path)


def test_the_errors_of_a_narrow_wire_are_told_once():
    figures = {"ffn_rms_error_percent": 0.2341, "ffn_largest_error_percent": 0.31}
    rows = [{**ROW, "case": {"rows": n, "wire_dtype": "bfloat16"}, "figures": figures} for n in (16, 64)]
    assert wire_error_table([*rows, ROW]).splitlines() == [
        "| experts | wire | RMS error, relative | largest error, of the largest output |",
        "| --- | --- | --- | --- |",
        "| ffn | bfloat16 | 0.234 % | 0.310 % |",
    ]


def test_the_pages_of_this_repository_have_a_place_for_everything():
    page = (DOCS / PAGE).read_text()
    for name in ["machine", "aims", *SUITES]:
        assert f"<!-- figures: {name} -->" in page
    assert "<!-- figures: wire_dtype -->" in (DOCS / EXACTNESS_PAGE).read_text()


def test_the_makefile_measures_every_suite():
    makefile = (DOCS.parent / "Makefile").read_text()
    assert f"\nSUITES := {' '.join(SUITES)}\n" in makefile
