"""Where questions come from: a person at a terminal, or the lines of a file or a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

_PROMPT = "> "


def typed_lines(notes: Console) -> Iterator[str]:
    """Lines that a person types, until Ctrl-D; Ctrl-C forgets the line and asks for another.

    Args:
        notes: Where to say so.
    """
    with contextlib.suppress(ImportError):
        # Makes ``input`` edit its line, and remember earlier ones.
        import readline  # noqa: F401
    while True:
        try:
            yield _typed(notes)
        except EOFError:
            notes.print()
            return
        except KeyboardInterrupt:
            notes.print()
            notes.print(Text("Ctrl-D or /quit ends the chat", style="dim"))


def piped_lines(out: Console) -> Iterator[str]:
    """The lines of standard input; on a terminal each is shown before its answer."""
    for line in sys.stdin:
        if out.is_terminal and line.strip():
            out.print(Text(_PROMPT + line.strip(), style="bold"))
        yield line


def _typed(notes: Console) -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # ``input`` would write its prompt among the answers.
    notes.print(_PROMPT, end="")
    return input()
