"""The folder of the ipc sockets: private to its user, paths that are short enough, and no sockets of the dead."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from pathlib import Path

from moe_runtime.errors import StartError

#: Longest path of a Unix socket on Linux, without its terminating zero.
MAX_IPC_PATH_BYTES = 107
_SUFFIX = ".ipc"
#: As long as the other, so that a path which is short enough for one is for both.
_NEAR_SUFFIX = ".shm"
_ADDRESS_PREFIX = "ipc://"


def default_ipc_folder() -> Path:
    """``/tmp/moe-runtime-<uid>``, the same for every process of a user on a machine.

    Not under ``$XDG_RUNTIME_DIR``: that goes when the user logs out, and a detached runtime stays.
    """
    return Path("/tmp") / f"moe-runtime-{os.geteuid()}"  # nosec B108  # its owner and mode are checked


def prepare_ipc_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, or check that an existing one is.

    Raises:
        StartError: If it cannot be made, is no folder, is another user's, or is open to others.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as exc:
        raise StartError(f"ipc folder {folder}: cannot be made: {exc}") from exc
    if not stat.S_ISDIR(status.st_mode):
        raise StartError(f"ipc folder {folder}: expected a folder, found something else, or a link")
    if status.st_uid != os.geteuid():
        raise StartError(f"ipc folder {folder}: expected owner {os.geteuid()}, found {status.st_uid}")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise StartError(f"ipc folder {folder}: expected mode 700, found {mode:o}; run `chmod 700 {folder}`")


def ipc_path(folder: Path, incarnation: int) -> Path:
    """Path of the socket of one process: names its pid, for people, and its incarnation, so it is never reused.

    Raises:
        StartError: If the path is too long for a Unix socket.
    """
    path = folder / f"{os.getpid()}-{incarnation:016x}{_SUFFIX}"
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise StartError(f"ipc path {path}: {num_bytes} bytes, a Unix socket allows {MAX_IPC_PATH_BYTES}")
    return path


def ipc_address(path: Path) -> str:
    """How ZeroMQ calls the socket at a path."""
    return f"{_ADDRESS_PREFIX}{path}"


def path_of(address: str | None) -> Path | None:
    """The path in an ipc address; None for any other address."""
    is_ipc = address is not None and address.startswith(_ADDRESS_PREFIX) and address.endswith(_SUFFIX)
    return Path(address.removeprefix(_ADDRESS_PREFIX)) if address is not None and is_ipc else None


def near_path(path: Path) -> Path:
    """Path of the socket through which the host at an ipc path shares memory."""
    return path.with_suffix(_NEAR_SUFFIX)


def remove_ipc(address: str) -> None:
    """Remove the sockets of a process that is dead or dying, by its ipc address, if they are still there."""
    path = path_of(address)
    if path is not None:
        path.unlink(missing_ok=True)
        near_path(path).unlink(missing_ok=True)


def sweep_ipc(folder: Path, *, min_age_s: float = 10.0) -> int:
    """Remove the sockets that dead processes left in a folder; those of the living are not touched.

    A socket is dead if it refuses connections. Process ids would not tell: they are reused, and a process in
    another container has its own.

    Args:
        folder: Where hosts bind; need not exist.
        min_age_s: Younger sockets stay: one that is being bound refuses connections for a moment.

    Returns:
        How many were removed.
    """
    oldest_kept = time.time() - min_age_s
    paths = [*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"*{_NEAR_SUFFIX}")]
    return sum(_remove_if_dead(path, oldest_kept) for path in paths)


def _remove_if_dead(path: Path, oldest_kept: float) -> bool:
    try:
        status = path.lstat()
        if not stat.S_ISSOCK(status.st_mode) or status.st_mtime > oldest_kept or not _refuses(path):
            return False
        path.unlink()
    except FileNotFoundError:
        # Its owner, or another sweep, was faster.
        return False
    return True


def _refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A stopped process with a full backlog must not stop the sweep.
        probe.setblocking(False)
        return probe.connect_ex(os.fsencode(path)) == errno.ECONNREFUSED
