"""The machines of a ``ray up`` file, reached as Ray itself reaches them: its providers, its ssh settings, its rsync."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from moe_runtime.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SSH_FAILED = 255
_CONNECT_TIMEOUT_S = 20
_LOCAL = "local"


class _Runner:
    """What Ray's command runners start processes with; hands output on by the line, and keeps the exit code."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self.on_line: Callable[[str], None] | None = None
        self.returncode = 0
        self.complaint = ""

    def check_call(self, command: Sequence[str], **_streams: Any) -> int:
        """Run a command to its end."""
        # No stdin: ssh would put the terminal of whoever deploys into raw mode.
        with (
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ) as process,
            ThreadPoolExecutor(1) as reader,
        ):
            complaint = reader.submit(_read, process.stderr)
            for line in process.stdout or ():
                if self.on_line is not None:
                    self.on_line(line.rstrip("\r\n"))
            self.complaint = complaint.result()
        self.returncode = process.returncode
        if self.returncode:
            raise subprocess.CalledProcessError(self.returncode, list(command))
        return 0

    def check_output(self, command: Sequence[str], **streams: Any) -> bytes:
        """Run a command to its end; what it printed."""
        lines: list[str] = []
        before, self.on_line = self.on_line, lines.append
        try:
            self.check_call(command, **streams)
        finally:
            self.on_line = before
        return "\n".join(lines).encode()


class Machine:
    """One machine of the cluster. Used by one thread at a time.

    Attributes:
        name: Its address, or what the provider calls it.
    """

    def __init__(self, name: str, command_runner: Any, processes: _Runner) -> None:
        """Wrap Ray's command runner."""
        self.name = name
        self._command_runner = command_runner
        self._processes = processes

    def run(self, command: str, *, on_line: Callable[[str], None] | None = None) -> int:
        """The exit code of a shell command in the login shell that Ray's own commands get.

        Args:
            command: For bash.
            on_line: Called with each line of its output, errors included, as it comes.

        Raises:
            StartError: If the machine cannot be reached.
        """
        self._processes.returncode, self._processes.on_line = 0, on_line
        self._attempt(lambda: self._command_runner.run(command, timeout=_CONNECT_TIMEOUT_S), "to run a command")
        return self._processes.returncode

    def output(self, command: str) -> list[str]:
        """The lines that a shell command prints.

        Raises:
            StartError: If the machine cannot be reached, or the command fails.
        """
        lines: list[str] = []
        returncode = self.run(command, on_line=lines.append)
        if returncode:
            said = "; ".join(line for line in lines if line.strip())
            raise StartError(f"{self.name}: expected `{command}` to work, it ended with {returncode}: {said}")
        return lines

    def send(self, folder: Path, target: str) -> None:
        """Bring the contents of a folder of this machine there; each file appears when it is whole.

        Raises:
            StartError: If it does not work; what has arrived stays.
        """
        self._processes.returncode, self._processes.on_line = 0, None
        self._attempt(lambda: self._command_runner.run_rsync_up(f"{folder}/", f"{target}/"), "to take files by rsync")
        if self._processes.returncode:
            raise StartError(f"{self.name}: expected it to take files by rsync, found: {self._processes.complaint}")

    def _attempt(self, action: Callable[[], object], doing: str) -> None:
        try:
            action()
        except Exception as exc:
            # Ray wraps the failure of a command in errors of its own; the exit code says what it was.
            if self._processes.returncode in (0, _SSH_FAILED):
                reason = self._processes.complaint or f"{type(exc).__name__}: {exc}"
                raise StartError(f"{self.name}: expected it to answer {doing}, found: {reason}") from exc


class Machines:
    """The machines of a cluster file; ``machines_of`` makes one."""

    def __init__(self, path: Path, config: dict[str, Any], provider: Any) -> None:
        """Keep what Ray made of the file."""
        self._path = path
        self._config = config
        self._provider = provider

    @property
    def is_local(self) -> bool:
        """Whether the file lists its machines: Ray then forgets to stop the workers."""
        settings = self._config["provider"]
        return bool(settings["type"] == _LOCAL and "head_ip" in settings)

    @property
    def num_listed(self) -> int:
        """How many machines the file lists; with others the head alone is certain to be there."""
        return 1 + len(self._config["provider"]["worker_ips"]) if self.is_local else 1

    def head(self) -> Machine:
        """The head.

        Raises:
            StartError: If the cluster is not up.
        """
        if self.is_local:
            return self._machine(self._config["provider"]["head_ip"], is_head=True)
        from ray.autoscaler._private.commands import _get_running_head_node

        try:
            node = _get_running_head_node(self._config, str(self._path), None, _provider=self._provider)
        except Exception as exc:
            raise StartError(f"{self._path}: expected its cluster to be up, found: {exc}; run `ray up` first") from exc
        return self._machine(node, is_head=True)

    def workers(self) -> tuple[Machine, ...]:
        """The workers that the file lists; of a cloud's, none: Ray ends those itself."""
        if not self.is_local:
            return ()
        return tuple(self._machine(ip, is_head=False) for ip in self._config["provider"]["worker_ips"])

    def take_down(self) -> None:
        """Do what ``ray down`` does.

        Raises:
            StartError: If Ray cannot.
        """
        from ray.autoscaler._private.commands import teardown_cluster

        try:
            # What its own `ray stop` on the head says was said before.
            with redirect_stderr(sys.stdout):
                teardown_cluster(str(self._path), True, False, None, False)
        except Exception as exc:
            raise StartError(f"{self._path}: expected `ray down` to work, found: {exc}") from exc

    def _machine(self, node: str, *, is_head: bool) -> Machine:
        from ray.autoscaler._private.updater import NodeUpdater

        processes = _Runner()
        updater = NodeUpdater(
            node_id=node,
            provider_config=self._config["provider"],
            provider=self._provider,
            auth_config=self._config["auth"],
            cluster_name=self._config["cluster_name"],
            file_mounts={},
            initialization_commands=[],
            setup_commands=[],
            ray_start_commands=[],
            runtime_hash="",
            file_mounts_contents_hash="",
            is_head_node=is_head,
            process_runner=processes,
            docker_config=self._config.get("docker"),
        )
        return Machine(str(node), updater.cmd_runner, processes)


@contextmanager
def machines_of(path: Path) -> Iterator[Machines]:
    """The machines of a cluster file, as long as the block lasts; Ray's own messages are not printed meanwhile.

    Raises:
        StartError: If Ray does not accept the file.
    """
    # Where the file lists its machines, only the first autoscaler starts all of them.
    os.environ.setdefault("RAY_UP_enable_autoscaler_v2", "0")
    logger = logging.getLogger("ray.autoscaler")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield _open(path)
    finally:
        logger.setLevel(level)


def _open(path: Path) -> Machines:
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    try:
        config = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        is_local = config["provider"]["type"] == _LOCAL
        # A file that lists its machines has nothing to look up, and may have changed.
        config = _bootstrap_config(config, no_config_cache=is_local)
        return Machines(path.expanduser(), config, _get_node_provider(config["provider"], config["cluster_name"]))
    except Exception as exc:
        lines = str(exc).strip().splitlines()
        reason = f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
        raise StartError(f"{path}: expected a `ray up` file that Ray accepts, found: {reason}") from exc


def _read(stream: IO[str] | None) -> str:
    """What ssh or rsync says of its own, without its good-byes."""
    lines = [line.strip() for line in stream or ()]
    return "; ".join(line for line in lines if line and not line.startswith(("Shared connection to", "Warning: Perm")))
