"""A whole router in this process: gRPC server, service, in-process transport and expert hosts, all of them real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_runtime.config.gates import LinearGateConfig
from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.experts.build import build_expert
from moe_runtime.experts.host import ExpertHost
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.rpc.server import RpcServer
from moe_runtime.service.host_loop import HostLoop
from moe_runtime.service.layer import ExpertInfo, RoutedLayer
from moe_runtime.service.router_service import RouterService
from moe_runtime.service.routing_table import Replica, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

WIDTH = 4
NUM_EXPERTS = 2
WAIT_S = 20.0
#: Output row of the layer ``wide``: 256 KiB of float32, so that 17 rows exceed one message.
WIDE = 1 << 16
LAYER_CHANGES: dict[str, dict[str, Any]] = {
    "vectors": {},
    "brain": {"dtype": torch.bfloat16},
    "doubles": {"dtype": torch.float64},
    "raw": {"allow_non_finite": True},
    "wide": {"out_shape": (WIDE,)},
    "stuck": {"timeout_s": 60.0},
}


class LiveRouter:
    """Layers of identity experts, whose answer is the input; ``wide`` answers zeros, ``stuck`` waits for ``free``."""

    def __init__(
        self,
        *,
        address: str = "127.0.0.1:0",
        limits: LimitsConfig,
        router: RouterConfig,
        security: SecurityConfig | None = None,
    ) -> None:
        network = InProcessNetwork()
        layers = {name: _layer(name, **changes) for name, changes in LAYER_CHANGES.items()}
        self.service = RouterService(layers, network.router_transport(), router=router, limits=limits)
        self.server = RpcServer(self.service, address=address, limits=limits, info={"name": "live"}, security=security)
        self.replicas: dict[tuple[str, int], tuple[Replica, ...]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._loops: dict[str, HostLoop] = {}
        self._transports = []
        for layer in layers.values():
            transport = network.host_transport()
            self._transports.append(transport)
            experts = {f"{layer.name}/{i}/0": build_expert(_spec(layer, i)) for i in range(NUM_EXPERTS)}
            for i, replica_id in enumerate(experts):
                self.replicas[layer.name, i] = (Replica(replica_id, transport.endpoint),)
            loop = HostLoop(ExpertHost(experts, device="cpu"), transport)
            self._loops[layer.name] = loop
            self._threads[layer.name] = threading.Thread(target=loop.run, daemon=True)
        self.service.set_table(RoutingTable(1, self.replicas))
        self.address = ""

    def start(self) -> LiveRouter:
        self.service.start()
        for name, thread in self._threads.items():
            if name != "stuck":
                thread.start()
        self.address = self.server.start()
        return self

    def wait_for(self, check: Callable[[dict[str, Any]], bool]) -> None:
        """Return once the service's status passes a check."""
        deadline = time.monotonic() + WAIT_S
        while not check(self.service.status()):
            assert time.monotonic() < deadline, self.service.status()
            time.sleep(0)

    def free(self) -> None:
        """Let the experts of ``stuck`` work."""
        self._threads["stuck"].start()

    def stop(self, grace_s: float = 0.0) -> None:
        self.server.stop(grace_s)
        self.service.close()
        for name, loop in self._loops.items():
            loop.stop()
            if self._threads[name].ident is not None:
                self._threads[name].join()
        for transport in self._transports:
            transport.close()


#: ``start_router(address=..., limits=..., router=..., security=...)``, each optional.
StartRouter = Callable[..., LiveRouter]


def _layer(name: str, **changes: Any) -> RoutedLayer:
    fields: dict[str, Any] = {
        "name": name,
        "item_shape": (WIDTH,),
        "out_shape": (WIDTH,),
        "dtype": torch.float32,
        "gate": build_gate(LinearGateConfig(), GateShape(WIDTH, NUM_EXPERTS), seed=0).eval(),
        "gate_features": WIDTH,
        "policy": build_policy(TopKPolicyConfig(k=2), num_experts=NUM_EXPERTS),
        "policy_kind": "top_k",
        "capacity": CapacityConfig(),
        "residual": "none",
        "weight_on": "output",
        "timeout_s": 5.0,
        "allow_non_finite": False,
        "max_batches_in_flight": 2,
        "experts": tuple(ExpertInfo(i, f"expert-{i}", "identity") for i in range(NUM_EXPERTS)),
    }
    return RoutedLayer(**{**fields, **changes})


def _spec(layer: RoutedLayer, expert_id: int) -> ExpertSpec:
    same = layer.out_shape == layer.item_shape
    return ExpertSpec(
        layer=layer.name,
        expert_id=expert_id,
        name=f"expert-{expert_id}",
        kind="identity" if same else "zero",
        item_shape=layer.item_shape,
        options={} if same else {"out_shape": list(layer.out_shape)},
        dtype=str(layer.dtype).removeprefix("torch."),
    )
