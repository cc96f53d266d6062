"""The head of a Ray cluster of its own, whose GCS can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

_GONE_WITHIN_S = 20.0


class RayHead:
    """``ray start --head`` in a folder of its own; ``end`` leaves nothing of it."""

    def __init__(self, *, is_persistent: bool) -> None:
        # Short: the paths of Ray's sockets lie below it.
        self._folder = Path(tempfile.mkdtemp(prefix="moe-head-"))
        store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self._folder / "gcs")}
        self.env = {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        port, client_port = _free_port(), _free_port()
        self.address = f"127.0.0.1:{port}"
        self._gcs: subprocess.Popen[bytes] | None = None
        options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={self._folder / 't'}"]
        options += ["--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
        options += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client_port}"]
        started = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "start", *options],
            env={**self.env, **(store if is_persistent else {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert started.returncode == 0, started.stdout + started.stderr
        self._command, self._gcs_env, self._gcs_pid = self._find_gcs()

    def kill_gcs(self) -> None:
        os.kill(self._gcs_pid, signal.SIGKILL)
        if self._gcs is not None:
            self._gcs.wait()

    def restart_gcs(self) -> None:
        """Start it as ``ray start`` has."""
        self._gcs = subprocess.Popen(
            self._command, env=self._gcs_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._gcs_pid = self._gcs.pid

    def workers(self) -> list[int]:
        """The processes of actors that belong to this head: descendants of its raylet."""
        raylets = {pid for pid, command in self._processes() if command[0].endswith(b"/raylet")}
        return [pid for pid in _pids() if _parent(pid) in raylets]

    def end(self) -> None:
        """Kill everything that was started for this head, and remove its folder."""
        pids = {*self.workers(), *(pid for pid, _ in self._processes())}
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._gcs is not None:
            self._gcs.wait()
        give_up_at = time.monotonic() + _GONE_WITHIN_S
        while any(map(is_alive, pids)):
            assert time.monotonic() < give_up_at, "a process of the head lives on"
            time.sleep(0.05)
        shutil.rmtree(self._folder)

    def _find_gcs(self) -> tuple[list[bytes], dict[bytes, bytes], int]:
        ((pid, command),) = [each for each in self._processes() if each[1][0].endswith(b"/gcs_server")]
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return command, dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair), pid  # type: ignore[misc]

    def _processes(self) -> list[tuple[int, list[bytes]]]:
        """Those that were given the folder: only this head's are."""
        mine = str(self._folder).encode()
        commands = [(pid, _command(pid)) for pid in _pids()]
        return [(pid, command) for pid, command in commands if any(mine in argument for argument in command)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1] or [b""]
    except OSError:
        return [b""]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])
