"""A layer served on Ray for a benchmark, and a router engine of the benchmark's own on the same expert actors."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from moe_runtime.bench.errors import BenchError
from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.launch.runtime import serve
from moe_runtime.ray_backend.cluster import connect
from moe_runtime.ray_backend.names import NAMESPACE, expert_name
from moe_runtime.routing.gates import LinearGate
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from moe_runtime.launch.recipes import LayerRecipe
    from moe_runtime.launch.runtime import Runtime
    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.routing_table import RoutingTable

LAYER = "layer"
_POLL_S = 1.0
#: Reservations, not cores: the largest suite must not wait for room.
_TOTAL_CPUS = 64.0


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray as it is initialised, else a cluster of this process, until the end of the ``with``."""
    # By default Ray's workers yield to everything else (nice 15): beside peers at nice 0 that is no comparison.
    os.environ.setdefault("RAY_worker_niceness", "0")
    cluster = connect("local", total_cpus=_TOTAL_CPUS)
    try:
        yield
    finally:
        cluster.disconnect()


def layer_config(*, num_experts: int = 8, kind: str = "identity", num_routers: int = 1, **layer: Any) -> dict[str, Any]:
    """The configuration of one layer of equal experts, top-2, 1024 features.

    Args:
        num_experts: How many.
        kind: Their kind.
        num_routers: Router processes.
        **layer: Further keys of the layer; ``options`` are those of the kind.
    """
    experts = {"kind": kind, "count": num_experts, "options": layer.pop("options", {})}
    return {
        "name": f"bench-{os.getpid()}",
        "device": "cpu",
        "router": {"address": "127.0.0.1:0", "replicas": num_routers},
        "layers": {
            LAYER: {"item_shape": [1024], "residual": "none", "timeout_ms": 30000, "experts": [experts], **layer}
        },
    }


@dataclass(frozen=True)
class Deployment:
    """A served layer.

    Attributes:
        runtime: What serves it.
        recipe: What it was made from.
        table: Where its experts are.
        start_s: Seconds until it served.
    """

    runtime: Runtime
    recipe: LayerRecipe
    table: RoutingTable
    start_s: float

    @property
    def host_pids(self) -> list[int]:
        """Process ids of the expert actors."""
        return [host["pid"] for host in self.runtime.describe()["hosts"]]

    @property
    def node(self) -> str:
        """Name of the node that everything runs on."""
        return next(iter(self.table.endpoints())).node


@contextlib.contextmanager
def deploy(config: Mapping[str, Any], *, on_progress: Callable[[int, int], None] | None = None) -> Iterator[Deployment]:
    """A configuration of one layer, served on the connected cluster until the end of the ``with``."""
    recipe = build_layers(load_config(config))[0]
    started = time.perf_counter()
    with serve(config, on_progress=on_progress) as runtime:
        start_s = time.perf_counter() - started
        yield Deployment(runtime, recipe, _table_of(runtime), start_s)


def _table_of(runtime: Runtime) -> RoutingTable:
    """The table that the controller published; every actor keeps it."""
    description = runtime.describe()
    host_id = description["hosts"][0]["host_id"]
    actor = ray.get_actor(expert_name(description["name"], host_id), namespace=NAMESPACE)
    snapshot: Any = ray.get(actor.kept.remote())
    if snapshot is None:
        raise BenchError(f"expert host {host_id}: expected it to keep a routing table, found none")
    table: RoutingTable = snapshot.table
    return table


def gate_weight(layer: RoutedLayer) -> Tensor:
    """The weight of a layer's gate, ``(num_experts, features)``.

    Raises:
        BenchError: If the gate is not linear.
    """
    if not isinstance(layer.gate, LinearGate):
        raise BenchError(f"layer {layer.name}: expected a linear gate, found {type(layer.gate).__name__}")
    return layer.gate.weight


class LibraryLayer:
    """A layer used as a library does: the engine in this process, driven directly, on a deployment's actors."""

    def __init__(self, deployment: Deployment) -> None:
        """Connect to the deployment's expert actors."""
        # More would wait, spinning, for cores that the experts are using.
        torch.set_num_threads(1)
        self.layer: RoutedLayer = build_routed_layer(deployment.recipe)
        self._transport = ZmqTransport(node=deployment.node)
        self.engine = RouterEngine({LAYER: self.layer}, self._transport, node=deployment.node)
        self.engine.set_table(deployment.table)

    @property
    def gate_weight(self) -> Tensor:
        """The linear gate's weight, ``(num_experts, features)``."""
        return gate_weight(self.layer)

    def forward(self, tokens: Tensor, *, k: int | None = None) -> BatchResult:
        """One batch from start to end, with ``k`` experts per token where that is not the layer's own number.

        Raises:
            BenchError: If an expert did not serve its rows.
        """
        self.engine.submit(Batch(LAYER, tokens, k=k))
        while True:
            for result in self.engine.poll(_POLL_S):
                if result.failures:
                    raise BenchError(f"experts failed: {dict(result.failures)}")
                return result

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()


@contextlib.contextmanager
def library_layer(deployment: Deployment) -> Iterator[LibraryLayer]:
    """The deployment's layer as a library uses it, until the end of the ``with``."""
    library = LibraryLayer(deployment)
    try:
        yield library
    finally:
        library.close()
