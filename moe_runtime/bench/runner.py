"""Runs suites one after the other: shows each one's table, and writes all rows."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.machine import describe_machine
from moe_runtime.bench.render import ShownStage, show_duration, show_machine, show_rows, show_tables, show_title
from moe_runtime.bench.results import SuiteRun, write_json
from moe_runtime.bench.suite import BenchSettings
from moe_runtime.bench.suites import SUITES
from moe_runtime.progress import make_progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from moe_runtime.bench.results import Row
    from moe_runtime.bench.suite import Suite


def run(
    names: Sequence[str] = (), *, json_path: Path | None = None, quick: bool = False, console: Console
) -> list[Row]:
    """Measure some suites, all of them if none is named, and show what was found.

    Args:
        names: The suites'.
        json_path: Where to write machine and rows as well, as JSON; written after every suite.
        quick: Fewer cases and shorter: a suite takes under a minute.
        console: Where to print.

    Raises:
        BenchError: If there is no such suite, something that it needs is not installed, or contenders disagree.
        MoERuntimeError: If the runtime does not start.
    """
    suites = [_find(name) for name in names] if names else _possible(console)
    machine = describe_machine()
    show_machine(console, machine)
    rows: list[Row] = []
    runs: dict[str, SuiteRun] = {}
    for suite in suites:
        started = time.perf_counter()
        rows += _measure(suite, quick=quick, console=console)
        seconds = round(time.perf_counter() - started, 1)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        commit = machine.get("commit")
        runs[suite.name] = SuiteRun(date, quick, seconds, None if commit is None else str(commit))
        show_duration(console, suite, seconds)
        if json_path is not None:
            write_json(json_path, machine=machine, rows=rows, runs=runs)
    return rows


def _find(name: str) -> Suite:
    if name not in SUITES:
        raise BenchError(f"suite: expected one of {', '.join(SUITES)}, found {name!r}")
    suite = SUITES[name]
    missing = suite.missing()
    if missing is not None:
        raise BenchError(f"suite {name}: {missing}")
    return suite


def _possible(console: Console) -> list[Suite]:
    """Every suite but those that lack something, which is said."""
    suites = []
    for suite in SUITES.values():
        missing = suite.missing()
        if missing is None:
            suites.append(suite)
        else:
            console.print(f"[yellow]suite {suite.name} is left out[/]: {missing}", highlight=False)
    return suites


def _measure(suite: Suite, *, quick: bool, console: Console) -> list[Row]:
    show_title(console, suite)
    with make_progress(console, has_notes=False) as progress:

        def begin(title: str) -> ShownStage:
            return ShownStage(progress, progress.add_task(title, total=None))

        rows = list(suite.run(BenchSettings(quick=quick, begin=begin)))
    if suite.tables is None:
        show_rows(console, rows)
    else:
        show_tables(console, suite.tables([row.as_json() for row in rows]))
    return rows
