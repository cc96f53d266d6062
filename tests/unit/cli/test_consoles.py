"""How wide results are: as a terminal, as COLUMNS says, and wide enough for tables in files and pipes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len

from moe_runtime.cli.consoles import WIDTH_WITHOUT_TERMINAL, stdout_console

COMMAND = [sys.executable, "-c", "from moe_runtime.cli import main; main()", "presets"]


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "COLUMNS"} | changes


def widest_line(text: str) -> int:
    return max(cell_len(line) for line in text.splitlines())


def presets_in_a_file(folder: Path, **changes: str) -> str:
    path = folder / "presets.txt"
    with path.open("w", encoding="utf-8") as file:
        subprocess.run(COMMAND, stdout=file, env=environment(**changes), check=True, timeout=50)
    return path.read_text(encoding="utf-8")


def test_tables_in_a_file_are_as_wide_as_their_headings_need(tmp_path: Path) -> None:
    text = presets_in_a_file(tmp_path)
    assert widest_line(text) == WIDTH_WITHOUT_TERMINAL == 120
    assert "Sparsely-Gated " in text
    assert "…" not in text


def test_tables_in_a_file_are_as_wide_as_the_environment_says(tmp_path: Path) -> None:
    assert widest_line(presets_in_a_file(tmp_path, COLUMNS="90")) == 90


@pytest.mark.parametrize("columns", ["", "wide"])
def test_columns_that_are_no_number_are_as_good_as_none(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert stdout_console().width == WIDTH_WITHOUT_TERMINAL


def test_tables_on_a_terminal_are_as_wide_as_it_is() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        termios.tcsetwinsize(theirs, (30, 95))
        with subprocess.Popen(
            COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", NO_COLOR="1")
        ) as process:
            os.close(theirs)
            text = _everything(terminal.fileno())
            assert process.wait(timeout=50) == 0
    heading = next(line for line in text.splitlines() if "policy" in line)
    # Bold remains without colours.
    assert cell_len(heading.replace("\x1b[1m", "").replace("\x1b[0m", "")) == 95


def _everything(terminal: int) -> str:
    """All that is written to a terminal until its last writer is gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # Linux' way of saying that nobody is left at the other end
            chunk = b""
        if not chunk:
            return b"".join(chunks).decode()
        chunks.append(chunk)
