"""A layer served on Ray for a benchmark, and a router engine of the benchmark's own on the same expert actors."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.bare.kept_table import kept_table
from moe_runtime.bench.library import LibraryLayer
from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.launch.runtime import serve
from moe_runtime.ray_backend.cluster import connect
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moe_runtime.launch.recipes import LayerRecipe
    from moe_runtime.launch.served import Runtime
    from moe_runtime.service.routing_table import RoutingTable

LAYER = "layer"
#: Reservations, not cores: the largest suite must not wait for room.
_TOTAL_CPUS = 64.0
_START_TIMEOUT_S = 300.0


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
        # Peers start beside the actors, and the machine may have other work.
        "start_timeout_s": _START_TIMEOUT_S,
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


def recipe_of(config: Mapping[str, Any]) -> LayerRecipe:
    """The recipe of a configuration's only layer."""
    (recipe,) = build_layers(load_config(config))
    return recipe


@contextlib.contextmanager
def deploy(config: Mapping[str, Any], *, on_progress: Callable[[int, int], None] | None = None) -> Iterator[Deployment]:
    """A configuration of one layer, served on the connected cluster until the end of the ``with``."""
    recipe = recipe_of(config)
    started = time.perf_counter()
    with serve(config, on_progress=on_progress) as runtime:
        start_s = time.perf_counter() - started
        description = runtime.describe()
        table = kept_table(description["name"], description["hosts"][0]["key"])
        yield Deployment(runtime, recipe, table, start_s)


@contextlib.contextmanager
def library_layer(deployment: Deployment) -> Iterator[LibraryLayer]:
    """The deployment's layer as a library uses it, until the end of the ``with``."""
    transport = ZmqTransport(node=deployment.node)
    layer = build_routed_layer(deployment.recipe)
    with contextlib.closing(LibraryLayer(layer, deployment.table, transport, node=deployment.node)) as library:
        yield library
