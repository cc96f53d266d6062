"""Weight files that a node has fetched, one per content, shared by its processes and runtimes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from moe_runtime.config.state_folder import is_at, state_folder
from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SUFFIX = ".safetensors"
_PART, _LOCK, _USER = ".part", ".lock", ".used-by."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def default_cache() -> WeightsCache:
    """The cache of this user on this machine."""
    return WeightsCache(state_folder() / "weights")


@dataclass(frozen=True)
class Removed:
    """What a clean-up took away: files, and their bytes."""

    num_files: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class WeightsCache:
    """``<sha256>.safetensors`` files in a folder.

    A file under its final name is whole and was what its name says when it came: it is written beside, compared, and
    renamed. Processes that want one file at the same time wait for one of them to fetch it. A process that is killed
    while it fetches leaves a part, which the next one overwrites.

    Attributes:
        folder: Made when it is first needed.
    """

    folder: Path

    def get(self, sha256: str, write: Callable[[BinaryIO], None], *, source: str, user: str) -> Path:
        """The file of that hash; fetched, if it is not there or no longer what its name says.

        Args:
            sha256: In hex.
            write: Fetches the file: writes its bytes.
            source: How messages name it.
            user: The runtime that uses it; it stays until all its users have released it.

        Raises:
            WeightsError: If what was fetched has another hash, or it cannot be stored; or whatever ``write`` raises.
        """
        path = self._path(sha256)
        with self._locked(sha256):
            self._mark(path, user).touch()
            if not path.is_file() or _sha256(path) != sha256:
                found = self._fetch(sha256, write, source=source)
                if found != sha256:
                    self._part(sha256).unlink()
                    raise WeightsError(
                        f"{source}: expected sha256 {sha256}, fetched a file with {found}; it is corrupt or was "
                        f"replaced: deploy again, or write its manifest anew"
                    )
                self._part(sha256).replace(path)
        return path

    def add(self, write: Callable[[BinaryIO], None], *, source: str, user: str) -> Path:
        """A file whose hash nobody knows before it is here; always fetched.

        Args:
            write: Fetches the file: writes its bytes.
            source: How messages name it; fetchers of one source take turns.
            user: As for ``get``.

        Raises:
            WeightsError: If it cannot be stored; or whatever ``write`` raises.
        """
        key = hashlib.sha256(source.encode()).hexdigest()
        with self._locked(key):
            sha256 = self._fetch(key, write, source=source)
            path = self._path(sha256)
            with self._locked(sha256):
                self._mark(path, user).touch()
                self._part(key).replace(path)
        return path

    def release(self, user: str) -> Removed:
        """Forget what a runtime uses; files that no runtime uses any more go, and parts that nobody is writing."""
        for path in self.folder.glob(f"*{_USER}{user}"):
            path.unlink(missing_ok=True)
        sizes = [size for path in self.folder.glob(f"*{_SUFFIX}") if (size := self._remove(path)) is not None]
        for part in self.folder.glob(f"*{_PART}"):
            self._remove(part)
        for lock in self.folder.glob(f"*{_LOCK}"):
            self._remove(lock)
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):
                folder.rmdir()
        return Removed(len(sizes), sum(sizes))

    def _remove(self, path: Path) -> int | None:
        """Remove a file unless it has users or is being fetched; its bytes."""
        lock = self.folder / f"{path.name.partition('.')[0]}{_LOCK}"
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if any(self.folder.glob(f"{path.stem}{_USER}*")):
                    return None
                num_bytes = path.stat().st_size
                path.unlink()
            except (BlockingIOError, FileNotFoundError):
                return None
            lock.unlink(missing_ok=True)
            return num_bytes

    def _fetch(self, key: str, write: Callable[[BinaryIO], None], *, source: str) -> str:
        """Write the part of a key; the hash of what was written."""
        try:
            with self._part(key).open("w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise WeightsError(f"{source}: cannot be stored in {self.folder}: {exc}") from exc

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self.folder / f"{key}{_LOCK}"
        while True:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = path.open("a")
            except OSError as exc:
                raise WeightsError(f"{self.folder}: expected a folder for fetched weights, found: {exc}") from exc
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A clean-up may have removed the lock while this process waited for it.
                if is_at(lock.fileno(), path):
                    yield
                    return

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise WeightsError(f"expected a sha256 of 64 hex digits, found {sha256!r}")
        return self.folder / f"{sha256}{_SUFFIX}"

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}{_PART}"

    def _mark(self, path: Path, user: str) -> Path:
        return self.folder / f"{path.stem}{_USER}{user}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
