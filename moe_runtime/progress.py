"""Bars for long work: what demos, benchmarks and chaos show while they are at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rich.console import Console


def make_progress(console: Console, *, has_notes: bool = True) -> Progress:
    """Bars for the stages of some work, which stay on the screen when they are done.

    Args:
        console: Where to show them.
        has_notes: Whether each task has a field ``note``, which stands behind its bar.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    ]
    if has_notes:
        columns.append(TextColumn("[dim]{task.fields[note]}[/]"))
    return Progress(*columns, console=console)
