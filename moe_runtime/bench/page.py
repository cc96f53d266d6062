"""Writes figures into the pages of `docs`: tables between their markers, and plots beside them.

Run as `python -m moe_runtime.bench.page RESULTS_FOLDER DOCS_FOLDER`, as `make bench-docs` does. What stands outside
the markers is written by hand and stays as it is; so does the table of a suite that the folder has no results of.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.aims import AIMS
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.plots import plot
from moe_runtime.bench.router_plots import plot_routers
from moe_runtime.bench.suites import SUITES
from moe_runtime.bench.tables import aim_table, figure_tables, machine_table, wire_error_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_runtime.bench.aims import JsonRow

PAGE, EXACTNESS_PAGE = "benchmarks.md", "exactness.md"
#: The suites that are plotted, and the key of the case that is their x axis.
_PLOTTED = {"exchange": "rows", "layer": "tokens", "peers": "tokens"}


@dataclass(frozen=True)
class SuiteResults:
    """One suite's part of a results file.

    Attributes:
        rows: As ``--json`` writes them.
        machine: Where they were measured.
        run: When, for how long, at which commit, and whether quickly; empty where the file does not say.
    """

    rows: Sequence[JsonRow]
    machine: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def date(self) -> str:
        """When it was measured, in ISO 8601; sorts."""
        return str(self.run.get("date", ""))

    def origin(self) -> str:
        """Where the figures come from, in a line."""
        form = "Quick run" if self.run.get("quick") else "Full run"
        when = f" of {self.date[:10]}" if self.date else ""
        took = f", {self.run['seconds']:.0f} s" if "seconds" in self.run else ""
        commit = self.run.get("commit") or self.machine.get("commit", "unknown")
        cpu, cores = self.machine.get("cpu", "unknown processor"), self.machine.get("cores", "?")
        return f"*{form}{when}{took}, commit `{commit}`, {cpu}, {cores} cores.*"


def load_results(folder: Path) -> dict[str, SuiteResults]:
    """The newest results of each suite, from all JSON files of a folder.

    Raises:
        BenchError: If the folder holds none.
    """
    found: dict[str, SuiteResults] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        rows_by_suite: dict[str, list[JsonRow]] = defaultdict(list)
        for row in content["rows"]:
            rows_by_suite[row["suite"]].append(row)
        for suite, rows in rows_by_suite.items():
            results = SuiteResults(rows, content["machine"], content.get("runs", {}).get(suite, {}))
            if suite not in found or found[suite].date <= results.date:
                found[suite] = results
    if not found:
        raise BenchError(f"{folder}: expected results of benchmarks, found none; `make bench-results` measures them")
    return found


def write_pages(results: Mapping[str, SuiteResults], docs: Path) -> None:
    """Put figures into the pages, and plots into ``img`` beside them.

    Args:
        results: By suite.
        docs: Folder of the pages.

    Raises:
        BenchError: If a page has no place for some of them.
    """
    newest = max(results.values(), key=lambda each: each.date)
    machine = {name: value for name, value in newest.machine.items() if name != "commit"}
    blocks = {
        "machine": machine_table(machine),
        "aims": aim_table(AIMS, {suite: each.rows for suite, each in results.items()}),
        **{suite: f"{each.origin()}\n\n{_tables(suite, each.rows)}" for suite, each in results.items()},
    }
    _fill(docs / PAGE, blocks)
    if "wire" in results:
        wire = results["wire"]
        _fill(docs / EXACTNESS_PAGE, {"wire_dtype": f"{wire_error_table(wire.rows)}\n\n{wire.origin()}"})
    for suite, x_key in _PLOTTED.items():
        if suite in results:
            plot(results[suite].rows, docs / "img" / f"bench-{suite}.svg", x_key=x_key)
    if "routers" in results:
        plot_routers(docs / "img")


def _tables(suite: str, rows: Sequence[JsonRow]) -> str:
    make_tables = SUITES[suite].tables if suite in SUITES else None
    if make_tables is None:
        return figure_tables(rows)
    return "\n\n".join(table.as_markdown() for table in make_tables(rows))


def _fill(path: Path, blocks: Mapping[str, str]) -> None:
    page = path.read_text()
    for name, content in blocks.items():
        pattern = re.compile(rf"<!-- figures: {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
        if not pattern.search(page):
            raise BenchError(f"{path.name}: expected a place for {name}: <!-- figures: {name} --> <!-- end -->")
        # A function's result is taken as it is; a string's backslashes would not be.
        page = pattern.sub(partial(_marked, name, content), page)
    path.write_text(page)


def _marked(name: str, content: str, _: re.Match[str]) -> str:
    return f"<!-- figures: {name} -->\n{content}\n<!-- end -->"


if __name__ == "__main__":
    write_pages(load_results(Path(sys.argv[1])), Path(sys.argv[2]))
