"""Where what can be made again is kept between runs."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$MOE_RUNTIME_CACHE``, else ``moe_runtime`` in the user's cache folder; it may not be there yet."""
    if root := environ.get("MOE_RUNTIME_CACHE"):
        return Path(root).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "moe_runtime"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, against other processes and threads that hold it; waits for them.

    Raises:
        ConfigError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as exc:
        raise ConfigError(f"{folder}: expected a folder that can be written, found: {exc}") from exc
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
