"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

_LOOK_EVERY_S = 1.0


class Reloaded(Generic[ValueT]):
    """Gives the newest good value of some files; looks for changes at most once a second. Thread-safe.

    What cannot be read later on is logged once, and the value before it stays.
    """

    def __init__(
        self, paths: Sequence[str | Path], load: Callable[[], ValueT], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the files for the first time.

        Args:
            paths: The files.
            load: Reads them all.
            now: Tells the time in seconds.

        Raises:
            ConfigError: If ``load`` does.
        """
        self._paths = tuple(Path(path) for path in paths)
        self._load = load
        self._now = now
        self._lock = threading.Lock()
        # Before they are read: what changes in between is noticed at the next look.
        self._stamps = self._look()
        self._value = load()
        self._look_at = now() + _LOOK_EVERY_S

    def current(self) -> ValueT:
        """The value."""
        if self._now() < self._look_at:
            return self._value
        with self._lock:
            if self._now() >= self._look_at:
                self._look_at = self._now() + _LOOK_EVERY_S
                self._reload()
            return self._value

    def _reload(self) -> None:
        stamps = self._look()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._load()
        except ConfigError as exc:
            logger.error("%s: changed, and cannot be used; what was read before stays in force: %s", names, exc)
        else:
            logger.warning("%s: changed, and read again", names)

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_private(path: Path) -> bytes:
    """The content of a file that only its owner may read.

    Raises:
        ConfigError: If others may read it, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            mode = status.st_mode & 0o777
            # Where files belong to root, as mounted secrets do, the group is how a process gets to read them.
            of_root = status.st_uid == 0 != os.geteuid()
            if mode & (0o037 if of_root else 0o077):
                raise ConfigError(
                    f"{path}: expected a file that its owner alone can read, found mode {mode:04o}; chmod 600 {path}"
                )
            return file.read()
    except OSError as exc:
        raise ConfigError(f"{path}: expected a file, found: {exc.strerror}") from exc
