"""One host of a lab: a machine that can be powered on and off, cut off, and asked to run commands."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHARED_MEMORY_MB = 512
BOOT_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 60.0


class LabError(Exception):
    """A host did not come up, or a command on it failed."""


@dataclass(frozen=True)
class Traffic:
    """IP packets of one kind that crossed a host's link.

    Attributes:
        sent_bytes: From the host, headers included.
        received_bytes: To the host, headers included.
    """

    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class Site:
    """What the hosts of one lab have in common.

    Attributes:
        folder: The lab's, seen by every host; only ``shared`` can be written.
        read_only: Files and folders of this machine that a host sees although its /tmp or home would hide them.
        environment: Variables of every command that is run on a host.
        network_pid: A process in the network namespace of the bridge.
    """

    folder: Path
    read_only: tuple[Path, ...]
    environment: Mapping[str, str]
    network_pid: int


@dataclass
class Host:
    """One machine of a lab; it is on when the lab gives it away.

    Attributes:
        name: Its host name, by which the lab's other hosts find it too.
        address: Its IPv4 address.
        folder: Holds its disk: ``root`` is its home, ``tmp`` its /tmp.
    """

    name: str
    address: str
    folder: Path
    _site: Site = field(repr=False)
    _network_pid: int = field(repr=False)
    _machine: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _counters: set[str] = field(default_factory=set, repr=False)

    def boot(self) -> None:
        """Power on, with the disk as it is but for /tmp, and return when its sshd listens.

        Raises:
            LabError: If it is on, or did not come up; with what it said on its console.
        """
        if self._machine is not None:
            raise LabError(f"host {self.name} is on")
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        for folder in ("root", "tmp"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").chmod(0o1777)
        arguments = [str(self.folder), str(self._site.folder / "shared"), *map(str, self._site.read_only)]
        with (self.folder / "console.log").open("wb") as console:
            self._machine = subprocess.Popen(
                [*enter(self._network_pid, "--net"), "unshare", "--mount", "--pid", "--uts", "--ipc", "--kill-child",
                 "--mount-proc", "bash", str(Path(__file__).with_name("host_init.sh")), *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=console, start_new_session=True,
                env={"PATH": SYSTEM_PATH, "LAB_SHM_MB": str(SHARED_MEMORY_MB)},
            )  # fmt: skip
        output = self._machine.stdout
        assert output is not None
        if not select.select([output], [], [], BOOT_TIMEOUT_S)[0] or output.readline() != b"ready\n":
            self._kill()
            raise LabError(f"host {self.name} did not come up: {(self.folder / 'console.log').read_text()}")
        self._set_link("up")

    def power_off(self) -> None:
        """Pull the plug: nothing leaves the host any more, not even the end of a connection. Safe to call twice."""
        if self._machine is not None:
            # First: processes that are killed have their connections closed by the kernel, which the peers would see.
            self._set_link("down")
            self._kill()

    def cut(self) -> None:
        """Pull the network cable: the host goes on by itself, and nothing gets in or out."""
        self._set_link("down")

    def heal(self) -> None:
        """Plug the network cable in again."""
        self._set_link("up")

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._machine is not None

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """What a command on this host, run by root in its home, gave: ``returncode``, ``stdout``, ``stderr``.

        Args:
            argv: The command; its PATH begins with this Python's programs.
            env: More environment variables; nothing of the caller's own environment gets in.
            check: Whether a command that fails raises.
            timeout_s: The command is killed then.

        Raises:
            LabError: If the host is off, or the command failed and ``check`` is set; with its output.
            subprocess.TimeoutExpired: If it took too long.
        """
        with self.start(argv, env=env) as process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            raise LabError(f"{self.name}: {' '.join(argv)} gave {process.returncode}\n{output}\n{errors}")
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO[str] | int = subprocess.PIPE,
        stderr: IO[str] | int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """A command that goes on, run as ``run`` does; killing what is returned kills the command itself.

        Raises:
            LabError: If the host is off.
        """
        if self._machine is None:
            raise LabError(f"host {self.name} is off")
        pid = self._machine.pid
        inside = enter(pid, "--mount", "--uts", "--ipc", "--net", f"--pid=/proc/{pid}/ns/pid_for_children")
        variables = {**self._site.environment, **(env or {})}
        return subprocess.Popen(
            # The command is a child of nsenter, which passes no signal on.
            [*inside, "setpriv", "--pdeathsig", "KILL", "env", "-i", "-C", "/root",
             *(f"{key}={value}" for key, value in variables.items()), *argv],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, env={"PATH": SYSTEM_PATH},
        )  # fmt: skip

    def pids(self) -> dict[int, str]:
        """The host's processes: their ids, as the host itself knows them, and their command lines; none of the dead."""
        if self._machine is None:
            return {}
        processes = {}
        for folder in Path(f"/proc/{self._init_pid(self._machine)}/root/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:
                    continue
                if words:
                    processes[int(folder.name)] = words
        return processes

    def link_bytes(
        self, *, peer: Host | None = None, ports: tuple[int, int] | None = None, is_own: bool = False
    ) -> Traffic:
        """What crossed the host's network link since this was asked for the first time; then it is zero.

        Args:
            peer: Only what is from or for this host.
            ports: Only TCP from or for these ports, the last one included, at either end.
            is_own: At this host's end only: what it says as the one who was called, not as a caller.

        Raises:
            LabError: If the counters could not be made or read.
        """
        end = "own" if is_own else "either"
        name = f"lab-{peer.name if peer else 'any'}-{end}-{'-'.join(map(str, ports or ('any',)))}"
        if name not in self._counters:
            self._count(name, peer=peer, ports=ports, is_own=is_own)
        rules = self.in_network(["iptables-save", "--counters", "--table", "filter"])
        sent = re.search(rf"^\[\d+:(\d+)\] -A OUTPUT .*--comment {name}( |$)", rules, re.MULTILINE)
        received = re.search(rf"^\[\d+:(\d+)\] -A INPUT .*--comment {name}( |$)", rules, re.MULTILINE)
        if sent is None or received is None:
            raise LabError(f"host {self.name}: the counter {name} is gone; found {rules}")
        return Traffic(sent_bytes=int(sent[1]), received_bytes=int(received[1]))

    def in_network(self, argv: Sequence[str]) -> str:
        """What a program of this machine prints when it is run in the host's network, also while the host is off.

        Raises:
            LabError: If it fails.
        """
        return run_here([*enter(self._network_pid, "--net"), *argv])

    def _count(self, name: str, *, peer: Host | None, ports: tuple[int, int] | None, is_own: bool) -> None:
        sending, receiving = (["-d", peer.address], ["-s", peer.address]) if peer else ([], [])
        if ports is not None:
            of_source, of_target = ("--source-ports", "--destination-ports") if is_own else ("--ports", "--ports")
            chosen = ["-p", "tcp", "-m", "multiport"]
            span = ":".join(str(port) for port in dict.fromkeys(ports))
            sending, receiving = [*sending, *chosen, of_source, span], [*receiving, *chosen, of_target, span]
        # A rule without a target counts and does nothing else. Loopback is no link.
        for chain in (["OUTPUT", "-o", "eth0", *sending], ["INPUT", "-i", "eth0", *receiving]):
            self.in_network(["iptables", "--wait", "-A", *chain, "-m", "comment", "--comment", name])
        self._counters.add(name)

    def _init_pid(self, machine: subprocess.Popen[bytes]) -> int:
        # Process 1 of the host has another id on this machine.
        return int(Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()[0])

    def _kill(self) -> None:
        machine, self._machine = self._machine, None
        if machine is None:
            return
        try:
            gone = os.pidfd_open(self._init_pid(machine))
        except (OSError, IndexError):
            gone = None
        machine.kill()
        machine.communicate()
        if gone is not None:
            # Process 1 is gone only when every other process of its namespace is.
            select.select([gone], [], [], BOOT_TIMEOUT_S)
            os.close(gone)

    def _set_link(self, state: str) -> None:
        run_here([*enter(self._site.network_pid, "--net"), "ip", "link", "set", f"v-{self.name}", state])


def enter(pid: int, *namespaces: str) -> list[str]:
    """The beginning of a command that runs in namespaces of the process ``pid``."""
    return ["nsenter", f"--target={pid}", *namespaces, "--"]


def run_here(argv: Sequence[str], *, stdin: str | None = None) -> str:
    """What a command of this machine printed.

    Raises:
        LabError: If it fails; with its output.
    """
    done = subprocess.run(argv, input=stdin, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)} gave {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
