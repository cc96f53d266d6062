"""The processes of a run: found by a mark in their environment, and looked at through ``/proc``."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = "MOE_RUNTIME_CHAOS_RUN"
_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def marked(run_id: str) -> Iterator[None]:
    """Have every process that starts within the ``with`` carry the run's mark, and so do its children."""
    os.environ[_MARK] = run_id
    try:
        yield
    finally:
        del os.environ[_MARK]


def is_marked(pid: int, run_id: str) -> bool:
    """Whether a process lives and belongs to a run; ids are reused, marks are not."""
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{_MARK}={run_id}".encode() in environment.split(b"\0")


def marked_pids(run_id: str) -> frozenset[int]:
    """Every living process of a run; this one, which was there before the mark, is none of them."""
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal())
    return frozenset(pid for pid in pids if pid != os.getpid() and is_marked(pid, run_id))


def command_of(pid: int) -> str:
    """What a process runs, for people; empty if it is gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    except OSError:
        return ""


def resident_bytes(pid: int) -> int | None:
    """Memory that a process holds; None if it is gone."""
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return None


def open_files(pid: int | str = "self") -> dict[int, str] | None:
    """What each descriptor of a process is open on; None if it is gone."""
    folder = _PROC / str(pid) / "fd"
    found = {}
    try:
        for entry in folder.iterdir():
            try:
                found[int(entry.name)] = str(entry.readlink())
            except FileNotFoundError:
                # Closed meanwhile: that of this very listing, for one.
                continue
    except OSError:
        return None
    return found
