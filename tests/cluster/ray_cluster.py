"""A Ray cluster that ``ray up cluster/local.yaml`` makes on the hosts of a lab."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml

from cluster.host import Host, LabError
from cluster.lab import REPOSITORY, Lab

TEMPLATE = REPOSITORY / "cluster" / "local.yaml"
UP_TIMEOUT_S = 180.0
DOWN_TIMEOUT_S = 120.0
JOIN_TIMEOUT_S = 150.0
PROGRAM_TIMEOUT_S = 90.0
#: Where it is not installed, as beside a source tree, its entry point is called.
MOE_RUNTIME = (
    ["moe-runtime"]
    if shutil.which("moe-runtime", path=f"{sys.prefix}/bin")
    else ["python", "-c", "from moe_runtime.cli import main; main()"]
)
#: What the command lines of Ray's own processes, and of its workers, have in common.
RAY_PROCESSES = ("ray::", "/ray/", "ray start")
#: Prints the living nodes as JSON when there are as many as the first argument says, or after the second one's seconds.
LIST_NODES = """
import json, sys, time
import ray
ray.init(address="auto", log_to_driver=False)
give_up_at = time.monotonic() + float(sys.argv[2])
while len(nodes := [node for node in ray.nodes() if node["Alive"]]) != int(sys.argv[1]):
    if time.monotonic() > give_up_at:
        break
    time.sleep(0.2)
print(json.dumps(nodes))
"""


@dataclass
class RayCluster:
    """A head, its workers, and the machine from which they are operated, which is no node of the cluster.

    Attributes:
        lab: Has the hosts; the first one is the head, the last one the operator's.
        file: The filled in cluster file, at the same path on every host.
        token: What a client of Ray has to know.
        seconds: How long each step took.
        is_up: Whether it was started, and not taken down since.
    """

    lab: Lab
    file: Path
    token: str
    seconds: dict[str, float] = field(default_factory=dict)
    is_up: bool = False

    @property
    def head(self) -> Host:
        """Where the head of the Ray cluster is."""
        return self.lab.hosts[0]

    @property
    def workers(self) -> tuple[Host, ...]:
        """The other nodes of the Ray cluster."""
        return self.lab.hosts[1:-1]

    @property
    def node_hosts(self) -> tuple[Host, ...]:
        """All hosts that are nodes of the Ray cluster."""
        return (self.head, *self.workers)

    @property
    def operator(self) -> Host:
        """The machine that calls ``ray up``; clients are there as well."""
        return self.lab.hosts[-1]

    def up(self) -> None:
        """Run ``ray up`` and wait for the workers, which its head starts.

        Raises:
            LabError: If it fails, or a worker does not join; with what was printed.
        """
        self.is_up = True
        began = time.monotonic()
        self.ray("up", "--yes", "--no-config-cache", timeout_s=UP_TIMEOUT_S)
        self.seconds["ray up"] = time.monotonic() - began
        self.nodes()
        self.seconds["all nodes"] = time.monotonic() - began

    def down(self) -> None:
        """Run ``moe-runtime cluster down``.

        Raises:
            LabError: If it fails; with what it printed.
        """
        with self.timed("cluster down" if self.is_up else "cluster down again"):
            argv = [*MOE_RUNTIME, "cluster", "down", "--yes", str(self.file)]
            self.operator.run(argv, timeout_s=DOWN_TIMEOUT_S)
        self.is_up = False

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Keep how long a step takes."""
        began = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - began

    def ray(self, verb: str, *arguments: str, timeout_s: float = UP_TIMEOUT_S) -> CompletedProcess[str]:
        """What a command of Ray's cluster launcher gave, run by the operator in the root of the repository."""
        command = 'cd "$0" && exec ray "$@"'
        argv = ["sh", "-c", command, str(REPOSITORY), verb, *arguments, str(self.file)]
        return self.operator.run(argv, timeout_s=timeout_s)

    def on(
        self,
        host: Host,
        script: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = PROGRAM_TIMEOUT_S,
    ) -> CompletedProcess[str]:
        """What a Python program gave that runs on a node as a user of it would run it: with the node's environment.

        Raises:
            LabError: If it fails; with what it printed.
        """
        command = '. ~/moe_runtime/env.sh; exec env "$@"'
        variables = [f"{key}={value}" for key, value in (env or {}).items()]
        argv = ["bash", "-c", command, "bash", *variables, "python", "-c", script, *arguments]
        return host.run(argv, timeout_s=timeout_s)

    def nodes(self, num_nodes: int | None = None, *, within_s: float = JOIN_TIMEOUT_S) -> list[dict[str, Any]]:
        """Ray's own records of its living nodes, as soon as there are as many: all of them, if no number is given.

        Raises:
            LabError: If there are not as many in time; with the end of what the head's autoscaler wrote.
        """
        expected = num_nodes if num_nodes is not None else 1 + len(self.workers)
        arguments = (str(expected), str(within_s))
        done = self.on(self.head, LIST_NODES, *arguments, timeout_s=within_s + PROGRAM_TIMEOUT_S)
        # Ray may print what it has to say about a node that was lost, before and after.
        printed = [line for line in done.stdout.splitlines() if line.startswith("[{")]
        listed: list[dict[str, Any]] = json.loads(printed[-1])
        if len(listed) != expected:
            log = self.head.run(
                ["bash", "-c", "tail -n 100 /tmp/ray/session_latest/logs/monitor.*"], check=False
            ).stdout
            raise LabError(f"expected {expected} nodes within {within_s:g} s, found {len(listed)}\n{log}")
        return listed


def ray_processes(host: Host) -> list[str]:
    """The command lines of Ray's processes on a host."""
    return [words for words in host.pids().values() if any(part in words for part in RAY_PROCESSES)]


def prepare(lab: Lab) -> RayCluster:
    """Fill in the cluster file, and give the hosts what the file says that they need; nothing of Ray runs yet."""
    cluster = RayCluster(lab, lab.shared / "local.yaml", secrets.token_hex(32))
    filled = yaml.safe_load(TEMPLATE.read_text())
    filled["provider"] |= {"head_ip": cluster.head.address, "worker_ips": [host.address for host in cluster.workers]}
    filled["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    cluster.file.write_text(yaml.safe_dump(filled, sort_keys=False))
    _write(cluster.operator, ".ray/auth_token", cluster.token)
    for host in (cluster.head, *cluster.workers):
        # Installed already: a lab has no way to pip's index.
        _write(host, "moe_runtime/labels.yaml", "{}\n")
        (host.folder / "root" / "moe_runtime" / "venv").symlink_to(sys.prefix)
    return cluster


def set_labels(host: Host, labels: Mapping[str, str]) -> None:
    """Give one machine labels of its own, as its administrator would."""
    _write(host, "moe_runtime/labels.yaml", yaml.safe_dump(dict(labels)))


def _write(host: Host, path: str, text: str) -> None:
    file = host.folder / "root" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)
