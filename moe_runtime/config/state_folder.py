"""Where the runtime keeps files of its own on a machine: bundles on the head, cached weights on the hosts."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names another folder, for machines whose home is small, or shared by many.
STATE_FOLDER_VARIABLE = "MOE_RUNTIME_HOME"


def state_folder() -> Path:
    """``$MOE_RUNTIME_HOME``, else ``~/.moe_runtime``; it need not exist."""
    named = os.environ.get(STATE_FOLDER_VARIABLE)
    return (Path(named) if named else Path.home() / ".moe_runtime").expanduser().absolute()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, against other processes that hold it in this way.

    Raises:
        OSError: If it cannot be made or opened.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held it before may have removed it.
            if is_at(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open is still what a path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
