"""How errors that are not ours are told: what a plug-in or torch raised, in one line."""

from __future__ import annotations


def in_one_line(error: BaseException) -> str:
    """Type and message of an error; of a longer message, its first line, as torch's go on with C++ frames."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
