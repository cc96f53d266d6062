"""A runtime that is served on the cluster of a lab, and load from a machine that is no node of it."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from cluster.closed_loop import LoadPlan
from cluster.host import Host
from cluster.ray_cluster import RayCluster
from moe_runtime.config.load import load_config
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_router
from moe_runtime.launch.recipes import LayerRecipe
from moe_runtime.launch.router_process import build_routed_layer

NAME, LAYER, NUM_FEATURES, NUM_EXPERTS, NUM_TOKENS = "lab", "l", 128, 6, 512
ROUTER_PORT = 50051
#: Below the ports that the kernel gives to connections, and above those that Ray gives to its workers.
DATA_PORTS = (20000, 20031)
TIMEOUT_S = 2.0
CONFIG = {
    "name": NAME,
    "device": "cpu",
    "threads": 1,
    "start_timeout_s": 120,
    "layers": {
        LAYER: {
            "item_shape": [NUM_FEATURES],
            "policy": {"kind": "top_k", "k": 2},
            "residual": "passthrough",
            "timeout_ms": TIMEOUT_S * 1000,
            # Three actors, for three nodes.
            "experts_per_actor": 2,
            "strategy": "spread",
            "experts": [
                {
                    "kind": "feed_forward",
                    "count": NUM_EXPERTS,
                    "options": {"hidden_features": 64, "out_features": NUM_FEATURES},
                }
            ],
        }
    },
    "router": {"replicas": 2, "address": f"node:{ROUTER_PORT}", "max_wait_ms": 0},
    "data_plane": {"port_range": list(DATA_PORTS)},
    # The lab's network is one machine's own.
    "security": {"insecure": True},
}
SERVE = """
import sys
import moe_runtime as moe
with moe.serve(sys.argv[1], ray_address=sys.argv[2], detach=True):
    pass
"""
DESCRIBE = """
import json, sys
from moe_runtime.launch.runtime import attach
with attach(sys.argv[1], ray_address=sys.argv[2]) as runtime:
    print(json.dumps(runtime.describe()))
"""
STOP = """
import sys
from moe_runtime.launch.runtime import attach
with attach(sys.argv[1], ray_address=sys.argv[2]) as runtime:
    runtime.close()
"""
#: How Ray titles the processes of this runtime's actors.
ACTOR_TITLES = ("ray::ExpertActor", "ray::RouterActor", "ray::ControllerActor")
LOAD_PROGRAM = Path(__file__).with_name("closed_loop.py")
LOAD_ENDS_WITHIN_S = 30.0


@dataclass(frozen=True)
class Line:
    """One request of a ledger; times are the machine's, which all its hosts share."""

    began: float
    ended: float
    error: str | None
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def latency_s(self) -> float:
        """From the call to its answer."""
        return self.ended - self.began

    @property
    def is_affected(self) -> bool:
        """Whether it was answered without an expert that it was meant for."""
        return self.error is not None or any(self.report[how] for how in ("dropped_failure", "rerouted", "retried"))


@dataclass
class Served:
    """The runtime and its routers; ``description`` is as old as the last ``look``.

    Attributes:
        cluster: Where it runs.
        config: Its configuration.
        figures: What was measured, by name.
        description: What its controller said of it last.
    """

    cluster: RayCluster
    config: Path
    figures: dict[str, Any] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    def look(self) -> dict[str, Any]:
        """Ask the controller what runs where."""
        printed = self.cluster.on(self.cluster.head, DESCRIBE, NAME, self.ray_address).stdout
        self.description = json.loads(printed.splitlines()[-1])
        return self.description

    def start(self) -> None:
        """Bring the runtime up, spread over all nodes; it serves when this returns."""
        self.cluster.on(self.cluster.head, SERVE, str(self.config), self.ray_address, timeout_s=240)
        self.look()

    def stop(self) -> None:
        """End the runtime."""
        self.cluster.on(self.cluster.head, STOP, NAME, self.ray_address)

    @property
    def ray_address(self) -> str:
        """Of the cluster, for those in its network."""
        return f"{self.cluster.head.address}:6379"

    @property
    def addresses(self) -> list[str]:
        """Of the routers."""
        return [router["address"] for router in self.description["routers"]]

    def experts_on(self, host: Host) -> list[int]:
        """Ids of the experts that are served on a host."""
        experts = self.description["layers"][LAYER]["experts"]
        return [
            expert["expert_id"]
            for expert in experts
            if any(address_of(replica["node"]) == host.address for replica in expert["replicas"])
        ]

    @torch.inference_mode()
    def experts_of(self, tokens: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ids of the experts that the gate chooses for each token, ``(num_tokens, 2)``."""
        layer = build_routed_layer(self._recipe())
        chosen: NDArray[np.int64] = layer.gate(torch.from_numpy(tokens)).topk(2).indices.numpy()
        return chosen

    def has_router(self, host: Host) -> bool:
        """Whether a router runs on a host."""
        return any(address_of(router["node"]) == host.address for router in self.description["routers"])

    def await_routers_off(self, host: Host, *, within_s: float) -> None:
        """Look until all routers are ready, and none is on a host."""

        def are_back() -> bool:
            self.look()
            routers = self.description["routers"]
            return not self.has_router(host) and all(router["state"] == "ready" for router in routers)

        eventually(are_back, within_s=within_s)

    @contextmanager
    def load(
        self,
        name: str,
        *,
        tokens: NDArray[np.float32] | None = None,
        addresses: Sequence[str] | None = None,
        **plan: Any,
    ) -> Iterator[Ledger]:
        """Requests from the clients' host for as long as the block takes, or as many as were asked for.

        Args:
            name: Of its files.
            tokens: What to send over and over, ``(num_tokens, NUM_FEATURES)``.
            addresses: Of the routers; all of them when None.
            plan: Other fields of ``LoadPlan``.
        """
        shared = self.cluster.lab.shared
        tokens = some_tokens() if tokens is None else tokens
        np.save(shared / f"{name}.tokens.npy", tokens)
        np.save(shared / f"{name}.outputs.npy", self._expert_outputs(tokens))
        files = LoadPlan(
            addresses=tuple(addresses or self.addresses),
            layer=LAYER,
            tokens=str(shared / f"{name}.tokens.npy"),
            outputs=str(shared / f"{name}.outputs.npy"),
            ledger=str(shared / f"{name}.jsonl"),
            stop=str(shared / f"{name}.stop"),
            **plan,
        )
        for leftover in (files.ledger, files.stop):
            Path(leftover).unlink(missing_ok=True)
        errors = shared / f"{name}.err"
        with errors.open("w", encoding="utf-8") as stderr:
            client = self.cluster.operator.start(
                ["python", str(LOAD_PROGRAM), json.dumps(asdict(files))], stdout=subprocess.DEVNULL, stderr=stderr
            )
        try:
            yield Ledger(Path(files.ledger), client)
        finally:
            Path(files.stop).touch()
            if client.wait(timeout=LOAD_ENDS_WITHIN_S):
                raise AssertionError(f"the load {name} failed: {errors.read_text()}")

    def _recipe(self) -> LayerRecipe:
        (layer,) = build_router(load_config(self.config)).layers
        return layer

    @torch.inference_mode()
    def _expert_outputs(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        experts = [build_expert(expert.spec).module for expert in self._recipe().experts]
        return torch.stack([expert(torch.from_numpy(tokens)) for expert in experts]).numpy()


class Ledger:
    """What became of the requests of one load."""

    def __init__(self, file: Path, client: subprocess.Popen[str]) -> None:
        self._file = file
        self._client = client

    def lines(self) -> list[Line]:
        """All requests that have ended, in the order of their ends."""
        if not self._file.exists():
            return []
        text = self._file.read_text()
        records = [json.loads(each) for each in text[: text.rfind("\n") + 1].splitlines()]
        return [Line(each.pop("began"), each.pop("ended"), each.pop("error"), each) for each in records]

    def wait_for(self, is_so: Callable[[list[Line]], bool], *, within_s: float) -> list[Line]:
        """The lines as soon as something is so of them."""
        return eventually(lambda: lines if is_so(lines := self.lines()) else None, within_s=within_s)

    def finish(self) -> list[Line]:
        """The lines of a load with a bounded number of requests, when all have ended."""
        self._client.wait(timeout=LOAD_ENDS_WITHIN_S)
        return self.lines()


def eventually(question: Callable[[], Any], *, within_s: float) -> Any:
    """The first answer that is truthy."""
    give_up_at = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < give_up_at, f"still {answer!r} after {within_s} s"
        time.sleep(0.05)
    return answer


def serve(cluster: RayCluster) -> Served:
    """A runtime that serves on a cluster."""
    config = cluster.lab.shared / "runtime.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    served = Served(cluster, config)
    with cluster.timed("serve"):
        served.start()
    return served


def actors(host: Host) -> dict[int, str]:
    """The processes of runtimes' actors on a host."""
    return {pid: words for pid, words in host.pids().items() if words.startswith(ACTOR_TITLES)}


def address_of(node: str) -> str:
    """The address of the node of that name."""
    return node.partition("/")[0]


def median_ms(lines: Sequence[Line]) -> float:
    """Median latency."""
    return statistics.median(line.latency_s for line in lines) * 1000


def some_tokens() -> NDArray[np.float32]:
    """Always the same ones, ``(NUM_TOKENS, NUM_FEATURES)``."""
    return np.random.default_rng(0).standard_normal((NUM_TOKENS, NUM_FEATURES), dtype=np.float32)
