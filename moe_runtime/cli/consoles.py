"""Where the command line writes: results to stdout, errors to stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

#: Columns of what goes to a file or a pipe, so that tables keep their headings; the environment's COLUMNS wins.
WIDTH_WITHOUT_TERMINAL = 120


def stdout_console() -> Console:
    """The console for results; plain where stdout is no terminal."""
    has_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(highlight=False, width=None if has_width else WIDTH_WITHOUT_TERMINAL)


def stderr_console() -> Console:
    """The console for what goes with a result and is no part of it; plain where stderr is no terminal."""
    has_width = sys.stderr.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(stderr=True, highlight=False, width=None if has_width else WIDTH_WITHOUT_TERMINAL)


def report_error(error: Exception) -> None:
    """Say on stderr what went wrong: one red line per line of the error's message."""
    console = Console(stderr=True, highlight=False)
    for line in str(error).splitlines() or [type(error).__name__]:
        # soft_wrap: a line stays a line, so that it can be searched for.
        console.print(Text(f"error: {line}", style="red"), soft_wrap=True)
