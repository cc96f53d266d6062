"""What a benchmark shows: progress while it measures, then a table."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.progress import Progress, TaskID

    from moe_runtime.bench.results import Row
    from moe_runtime.bench.suite import Suite
    from moe_runtime.bench.tables import TextTable


class ShownStage:
    """A bar that grows; implements ``Stage``."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        """Take over a bar."""
        self._progress = progress
        self._task = task

    def update(self, num_done: int, num_all: int) -> None:
        """So many steps of so many are done."""
        self._progress.update(self._task, completed=num_done, total=num_all)


def show_title(console: Console, suite: Suite) -> None:
    """One line on what is about to be measured."""
    console.print(f"[bold]{suite.name}[/]: {suite.title}\n")


def show_duration(console: Console, suite: Suite, seconds: float) -> None:
    """How long a suite took."""
    console.print(f"[dim]{suite.name} took {seconds:.0f} s[/]\n", highlight=False)


def show_machine(console: Console, machine: Mapping[str, Any]) -> None:
    """The machine in one paragraph."""
    console.print("[dim]" + ", ".join(f"{name} {value}" for name, value in machine.items()) + "[/]\n")


def show_tables(console: Console, tables: Sequence[TextTable]) -> None:
    """Tables that a suite has made of its rows."""
    for table in tables:
        console.print(f"\n{table.title}:", highlight=False)
        console.print(_text_table(table))


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """A suite's rows: medians in milliseconds with the middle half of the calls, and ratios.

    Each sort of case, that is each set of keys, has a table of its own.
    """
    sorts: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        sorts[tuple(row.case)].append(row)
    console.print()
    for members in sorts.values():
        console.print(_table_of(members))
        console.print()


def _text_table(content: TextTable) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(content.header):
        table.add_column(name, justify="right" if number else "left")
    for line in content.lines:
        table.add_row(*line)
    return table


def _table_of(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    case_keys = list(dict.fromkeys(key for row in rows for key in row.case))
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    for key in case_keys:
        table.add_column(key.replace("_", " "), justify="right")
    table.add_column("ours ms", justify="right")
    table.add_column("peer")
    table.add_column("peer ms", justify="right")
    table.add_column("ours ÷ peer", justify="right")
    for name in figures:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(str(row.case.get(key, "")) for key in case_keys),
            _with_spread(row.ours.median_ms, row.ours.spread_ms),
            row.peer,
            _with_spread(row.theirs.median_ms, row.theirs.spread_ms),
            f"[bold {'green' if row.ratio <= 1 else 'yellow'}]{row.ratio:.2f}[/]",
            *(f"{row.figures[name]:,.3g}" if name in row.figures else "" for name in figures),
        )
    return table


def _with_spread(median: float, spread: tuple[float, float]) -> str:
    return f"[bold]{median:.3g}[/] [dim]{spread[0]:.3g}-{spread[1]:.3g}[/]"
