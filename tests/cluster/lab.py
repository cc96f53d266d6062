"""Hosts on one machine: each with its own address, sshd, process table, home, /tmp and shared memory.

A host is a set of Linux namespaces (network, mount, pid, uts, ipc). The hosts of a lab are on one bridge, which is in a
network namespace of its own as well: nothing enters a lab or leaves it, and two labs at once may use the same
addresses. No namespace has a name: processes hold them, and each of those ends when the test process does, however that
ends. What a killed test leaves is a folder, and the next ``Lab`` removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.host import SYSTEM_PATH, Host, Site, enter, run_here

REPOSITORY = Path(__file__).resolve().parents[2]
#: 198.18/15 is set aside for tests of networks (RFC 2544): no real host has such an address.
NETWORK = "198.18.77"
#: Not below /tmp, which each host has to itself.
FOLDERS = Path("/var/tmp")
PREFIX = "moe-lab-"
#: What a host alone has installed; need not exist.
OWN_PACKAGES = "/root/plug-ins"
#: Program -> the Debian package that has it.
PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "iptables": "iptables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
SSHD_CONFIG = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
PidFile /run/sshd.pid
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
MaxStartups 50
MaxSessions 50
"""


def missing_packages() -> list[str]:
    """The Debian packages that a lab needs and this machine lacks."""
    lacking = {package for program, package in PROGRAMS.items() if shutil.which(program, path=SYSTEM_PATH) is None}
    return sorted(lacking)


def missing() -> str:
    """What keeps this machine from having a lab, and what to do about it; empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"hosts are made of Linux namespaces; this is {sys.platform}"
    if packages := missing_packages():
        return f"needs Debian packages: apt-get install --no-install-recommends {' '.join(packages)}"
    attempt = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "sh", "-c",
         "ip link add br0 type bridge && iptables --list-rules"],
        env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if attempt.returncode:
        return f"needs root, network bridges and the right to make namespaces (CAP_SYS_ADMIN): {attempt.stderr.strip()}"
    return ""


class Lab:
    """Hosts ``h1``, ``h2``, ... that are on, reach each other and nothing else, and are gone at the end.

    Attributes:
        hosts: All of them.
        key: The private key with which root of each host lets in root of any other.
        shared: A folder that every host and this machine see at the same path; everything else of this machine that a
            host sees is read-only.
    """

    def __init__(self, *, num_hosts: int) -> None:
        """Say how many hosts; they are there inside of ``with``."""
        self._num_hosts = num_hosts
        self._resources = ExitStack()
        self.hosts: tuple[Host, ...] = ()

    def __enter__(self) -> Self:
        sweep()
        with self._resources:
            folder = self._make_folder()
            self.key, self.shared = folder / "key", folder / "shared"
            self._prepare(folder)
            bridge = self._hold_network()
            run_here(
                [*enter(bridge, "--net"), "ip", "-batch", "-"], stdin="link add br0 type bridge\nlink set br0 up\n"
            )
            site = Site(folder, _read_only(), _environment(), bridge)
            self.hosts = tuple(self._add_host(f"h{number}", site) for number in range(1, self._num_hosts + 1))
            for host in self.hosts:
                self._resources.callback(host.power_off)
                host.boot()
            self._resources = self._resources.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    def _make_folder(self) -> Path:
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=FOLDERS))
        self._resources.callback(os.close, _lock(hidden))
        # Locked before ``sweep`` of another process can see it.
        folder = hidden.rename(FOLDERS / hidden.name.removeprefix("."))
        self._resources.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _prepare(self, folder: Path) -> None:
        self.shared.mkdir()
        for name in ("key", "host_key"):
            run_here(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
        lines = [f"{_address(number)} h{number}\n" for number in range(1, self._num_hosts + 1)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (folder / "resolv.conf").touch()

    def _hold_network(self) -> int:
        """The id of a process that does nothing but hold a network namespace, until its standard input ends."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo held; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": SYSTEM_PATH}, start_new_session=True,
        )  # fmt: skip
        self._resources.callback(holder.communicate)
        assert holder.stdout is not None
        holder.stdout.readline()
        return holder.pid

    def _add_host(self, name: str, site: Site) -> Host:
        address = _address(int(name[1:]))
        network = self._hold_network()
        cable = f"link add v-{name} type veth peer name eth0 netns {network}\nlink set v-{name} master br0\n"
        run_here([*enter(site.network_pid, "--net"), "ip", "-batch", "-"], stdin=cable)
        # The way out leads nowhere: programs that look for the machine's own address ask for the way to a public one.
        interface = (
            f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via {NETWORK}.254\n"
        )
        run_here([*enter(network, "--net"), "ip", "-batch", "-"], stdin=interface)
        folder = site.folder / name
        (folder / "root").mkdir(parents=True)
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(address=address, folder=site.folder))
        (folder / "root" / ".bashrc").write_text("".join(f"export {k}='{v}'\n" for k, v in site.environment.items()))
        return Host(name, address, folder, site, network)


def sweep() -> list[Path]:
    """The folders of labs whose process is dead, which are no more."""
    swept = []
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        try:
            lock = _lock(folder)
        except BlockingIOError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        swept.append(folder)
    return swept


def _lock(folder: Path) -> int:
    """A descriptor that keeps ``sweep`` off the folder for as long as it is open, which no killed process keeps it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _address(number: int) -> str:
    return f"{NETWORK}.{10 + number}"


def _read_only() -> tuple[Path, ...]:
    """This Python with its packages, and the package under test."""
    return tuple({Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1], REPOSITORY})


def _environment() -> dict[str, str]:
    return {
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": "xterm",
        "PATH": f"{sys.prefix}/bin:{SYSTEM_PATH}",
        # The package is installed on the hosts, so to speak.
        "PYTHONPATH": f"{REPOSITORY}:{OWN_PACKAGES}",
    }


if __name__ == "__main__":
    sys.stdout.write(f"{missing() or 'this machine can have a lab'}\n")
