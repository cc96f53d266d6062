"""A configuration with weight files of its own, deployed by the operator of a lab's cluster as a user would do it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cluster.host import Host
from cluster.ray_cluster import MOE_RUNTIME, RayCluster
from moe_runtime.experts.weights import save_weights, sha256_of, write_manifest

NAME, LAYER, NUM_EXPERTS, NUM_FEATURES, NUM_HIDDEN, NUM_CLASSES, NUM_TOKENS = "digits", "digits", 3, 64, 32, 10, 40
ROUTER_PORT = 50061
CONFIG = {
    "name": NAME,
    "device": "cpu",
    "threads": 1,
    "start_timeout_s": 120,
    "layers": {
        LAYER: {
            "item_shape": [NUM_FEATURES],
            "gate": {"kind": "linear", "weights": "gate.safetensors"},
            "policy": {"kind": "top_k", "k": 2},
            "timeout_ms": 20_000,
            "strategy": "spread",
            "experts": [
                {
                    "kind": "feed_forward",
                    "count": 2,
                    "weights": "experts/e{i}.safetensors",
                    "options": {"hidden_features": NUM_HIDDEN, "out_features": NUM_CLASSES},
                },
                {
                    "kind": "feed_forward",
                    "replicas": 2,
                    "weights": "experts/e2.safetensors",
                    "options": {"hidden_features": NUM_HIDDEN, "out_features": NUM_CLASSES},
                },
            ],
        }
    },
    "router": {"replicas": 2, "address": f"node:{ROUTER_PORT}"},
    "data_plane": {"port_range": [20100, 20131]},
    # The lab's network is one machine's own.
    "security": {"insecure": True},
}
CALL = """
import sys
import numpy as np, moe_runtime as moe
with moe.MoEClient(sys.argv[1:]) as client:
    answer = client.forward(np.load("digits/tokens.npy"), layer="digits", timeout_s=30.0)
np.save("digits/outputs.npy", answer.outputs)
"""
CALL_UNTIL_STOPPED = """
import pathlib, sys
import numpy as np, moe_runtime as moe
tokens, answers = np.load("digits/tokens.npy"), []
with moe.MoEClient(sys.argv[1:]) as client:
    while not pathlib.Path("digits/stop").exists():
        answers.append(client.forward(tokens, layer="digits", timeout_s=30.0).outputs)
        np.save("digits/answers.part.npy", np.stack(answers))
        pathlib.Path("digits/answers.part.npy").rename("digits/answers.npy")
"""
SERVED_BY_DEPOT = """
import json, sys
import ray
from moe_runtime.ray_backend.names import NAMESPACE, depot_name
ray.init(address="auto", log_to_driver=False)
depot = ray.get_actor(depot_name(*sys.argv[1:]), namespace=NAMESPACE)
print(json.dumps(ray.get(depot.served.remote(), timeout=30)))
"""
#: How Ray titles the processes of a runtime's actors.
TITLES = ("ray::ExpertActor", "ray::RouterActor", "ray::ControllerActor", "ray::Depot")
COMMAND_TIMEOUT_S = 240.0
ENDED_WITHIN_S = 20.0
ANSWERED_WITHIN_S = 60.0


@dataclass
class Submission:
    """The configuration on the operator's machine, and what became of it.

    Attributes:
        cluster: Where it is deployed.
        text: What ``deploy`` printed.
        before: What was on each host before: its traces of any runtime.
    """

    cluster: RayCluster
    text: str = ""
    before: dict[str, Traces] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The configuration's folder, as this process sees it."""
        return self.cluster.operator.folder / "root" / NAME

    @property
    def nodes(self) -> tuple[Host, ...]:
        """The hosts of the cluster."""
        return self.cluster.node_hosts

    @property
    def addresses(self) -> list[str]:
        """Of the routers, as they were printed."""
        (line,) = (line for line in self.text.splitlines() if line.startswith("serving "))
        return line.removeprefix(f"serving {LAYER} at ").split(", ")

    def write(self) -> None:
        """Write the configuration, its weight files and some tokens."""
        (self.folder / "experts").mkdir(parents=True)
        for expert_id in range(NUM_EXPERTS):
            self.write_expert(expert_id, seed=expert_id)
        save_weights(self.gate_file, {"weight": 4 * drawn(7, NUM_EXPERTS, NUM_FEATURES)})
        np.save(self.folder / "tokens.npy", drawn(8, NUM_TOKENS, NUM_FEATURES).numpy() * NUM_FEATURES**0.5)
        self.write_config("config.yaml")

    def write_expert(self, expert_id: int, *, seed: int) -> None:
        """Write the weights of an expert, and the manifest anew."""
        shapes = {"up.weight": (NUM_HIDDEN, NUM_FEATURES), "up.bias": (NUM_HIDDEN,)}
        shapes |= {"down.weight": (NUM_CLASSES, NUM_HIDDEN), "down.bias": (NUM_CLASSES,)}
        tensors = {name: drawn(100 * seed + index, *shape) for index, (name, shape) in enumerate(shapes.items())}
        save_weights(self.expert_files[expert_id], tensors)
        write_manifest(self.folder / "experts")

    def write_config(self, file: str, **changes: Any) -> str:
        """Write a configuration; give its path on the operator's machine."""
        (self.folder / file).write_text(yaml.safe_dump({**CONFIG, **changes}))
        return f"{NAME}/{file}"

    @property
    def expert_files(self) -> list[Path]:
        """The weights of each expert."""
        return [self.folder / "experts" / f"e{i}.safetensors" for i in range(NUM_EXPERTS)]

    @property
    def gate_file(self) -> Path:
        """The weights of the gate."""
        return self.folder / "gate.safetensors"

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What ``moe-runtime`` gave on the operator's machine."""
        return self.cluster.operator.run([*MOE_RUNTIME, *arguments], check=check, timeout_s=COMMAND_TIMEOUT_S)

    def deploy(self, config: str = f"{NAME}/config.yaml", *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What deploying a configuration gave."""
        return self.run("deploy", config, "--cluster", str(self.cluster.file), check=check)

    def upgrade(self) -> str:
        """What rolling to the configuration as it is now printed."""
        return self.run("upgrade", f"{NAME}/config.yaml", "--cluster", str(self.cluster.file)).stdout

    @contextmanager
    def calling(self) -> Iterator[list[np.ndarray]]:
        """A client on the operator's machine calls for as long as the block takes; then there are its answers.

        The first of them is there when the block begins. A call that fails ends the client, and the test.
        """
        stop, file = self.folder / "stop", self.folder / "answers.npy"
        argv = ["python", "-c", CALL_UNTIL_STOPPED, *self.addresses]
        client = self.cluster.operator.start(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answers: list[np.ndarray] = []
        try:
            give_up_at = time.monotonic() + ANSWERED_WITHIN_S
            while not file.exists():
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
            yield answers
        finally:
            stop.touch()
            returncode = client.wait(timeout=ANSWERED_WITHIN_S)
            stop.unlink()
        assert returncode == 0
        answers += list(np.load(file))

    def teardown(self, name: str = NAME) -> str:
        """What tearing a runtime down printed."""
        return self.run("teardown", name, "--cluster", str(self.cluster.file)).stdout

    def start_deploying(self) -> subprocess.Popen[str]:
        """A deployment that is under way."""
        argv = [*MOE_RUNTIME, "deploy", f"{NAME}/config.yaml", "--cluster", str(self.cluster.file)]
        return self.cluster.operator.start(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def statuses(self) -> list[dict[str, Any]]:
        """What ``moe-runtime status`` says of each router that was printed."""
        addresses = [word for address in self.addresses for word in ("--address", address)]
        routers: list[dict[str, Any]] = json.loads(self.run("status", "--json", *addresses).stdout)["routers"]
        return routers

    def call(self) -> np.ndarray:
        """What a client on the operator's machine gets for the tokens."""
        self.cluster.operator.run(["python", "-c", CALL, *self.addresses])
        outputs: np.ndarray = np.load(self.folder / "outputs.npy")
        return outputs

    def served_by_depot(self, deployment: str) -> dict[str, dict[str, int]]:
        """Bytes that each host fetched of each file, by its address and the file's sha256."""
        served = json.loads(self.cluster.on(self.cluster.head, SERVED_BY_DEPOT, NAME, deployment).stdout)
        return {node.partition("/")[0]: files for node, files in served.items()}


@dataclass(frozen=True)
class Traces:
    """What a host has of runtimes: ids of processes, files of its homes' state folder, ipc sockets, shared memory."""

    pids: frozenset[int]
    state: frozenset[str]
    ipc: frozenset[str]
    shared_memory: frozenset[str]


def traces(host: Host) -> Traces:
    """Look at a host."""
    names = host.run(["ls", "/dev/shm"]).stdout.split()
    return Traces(
        pids=frozenset(pid for pid, words in host.pids().items() if words.startswith(TITLES)),
        state=_below(host.folder / "root" / ".moe_runtime"),
        ipc=_below(host.folder / "tmp" / "moe-runtime-0"),
        # Ray's own files come and go.
        shared_memory=frozenset(name for name in names if not name.startswith(("plasma", "ray", "sem."))),
    )


def traces_when_ended(host: Host, before: Traces) -> Traces:
    """What a host has when the processes of an ended runtime are gone, or were given time enough."""
    give_up_at = time.monotonic() + ENDED_WITHIN_S
    while (now := traces(host)) != before and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return now


def expected_outputs(submission: Submission) -> np.ndarray:
    """The layer in plain numpy, from its weight files: the two best experts of each token, by their softmax."""
    tokens = np.load(submission.folder / "tokens.npy").astype(np.float64)
    experts = np.stack([_feed_forward(tokens, _tensors(path)) for path in submission.expert_files], axis=1)
    scores = np.exp(tokens @ _tensors(submission.gate_file)["weight"].T)
    scores[np.arange(len(tokens)), scores.argmin(axis=1)] = 0
    weights = scores / scores.sum(axis=1, keepdims=True)
    outputs: np.ndarray = (weights[:, :, None] * experts).sum(axis=1)
    return outputs


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Numbers whose sums over the last dimension are of size 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def hashes(paths: Sequence[Path]) -> dict[str, int]:
    """sha256 and size of files."""
    return {sha256_of(path): path.stat().st_size for path in paths}


def _feed_forward(tokens: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    hidden = np.maximum(tokens @ tensors["up.weight"].T + tensors["up.bias"], 0)
    outputs: np.ndarray = hidden @ tensors["down.weight"].T + tensors["down.bias"]
    return outputs


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}


def _below(folder: Path) -> frozenset[str]:
    """Paths of a folder and all that is below."""
    return frozenset(str(path) for path in (folder, *folder.rglob("*")) if path.exists() or path.is_symlink())
