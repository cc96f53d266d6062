"""One router: gates and rules from recipes, the service, its transport, and the gRPC server before it."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import ConfigError, StartError
from moe_runtime.launch.gates import gate_shape, load_gate
from moe_runtime.launch.router_metrics import RouterMetrics
from moe_runtime.launch.turn_watch import TurnWatch
from moe_runtime.ray_backend.plan import RouterReport
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.rpc.server import RpcServer
from moe_runtime.service.generations import RouterSetup
from moe_runtime.service.layer import ExpertInfo, RoutedLayer
from moe_runtime.service.router_service import RouterService

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from moe_runtime.experts.weights_store import WeightsStore
    from moe_runtime.launch.recipes import LayerRecipe, RouterRecipe
    from moe_runtime.routing.gate import Gate
    from moe_runtime.routing.policy import Policy
    from moe_runtime.service.ports import Transport
    from moe_runtime.service.routing_table import RoutingTable

#: How long answers that are ready may take to leave when the server stops.
_GRACE_S = 2.0
_ANSWER_TIMEOUT_S = 2.0
#: Longer than any batch takes to be routed.
_MAX_TURN_S = 4.0


def build_routed_layer(recipe: LayerRecipe, *, store: WeightsStore | None = None) -> RoutedLayer:
    """A layer as the router sees it.

    Args:
        recipe: The layer.
        store: Gives the gate's weight file; without one, paths of this machine and addresses work.

    Raises:
        ConfigError: If the gate's weights or the policy do not work.
    """
    policy = build_policy(recipe.policy, num_experts=recipe.num_routed)
    return RoutedLayer(
        name=recipe.name,
        item_shape=recipe.item_shape,
        out_shape=recipe.out_shape,
        dtype=getattr(torch, recipe.dtype),
        gate=_gate(recipe, policy, store),
        gate_features=recipe.gate_features,
        policy=policy,
        policy_kind=recipe.policy.kind,
        capacity=recipe.capacity,
        residual=recipe.residual,
        weight_on=recipe.weight_on,
        timeout_s=recipe.timeout_s,
        allow_non_finite=recipe.allow_non_finite,
        max_batches_in_flight=recipe.max_batches_in_flight,
        exact=recipe.exact,
        wire_dtype=getattr(torch, recipe.wire_dtype),
        on_failure=recipe.on_failure,
        hedge=recipe.hedge,
        allow_batch_coupled=recipe.allow_batch_coupled,
        num_shared=recipe.num_shared,
        level=recipe.level,
        experts=tuple(
            ExpertInfo(expert.spec.expert_id, expert.spec.name, expert.spec.kind) for expert in recipe.experts
        ),
    )


def build_setup(recipe: RouterRecipe, *, store: WeightsStore | None = None) -> RouterSetup:
    """What a router serves.

    Args:
        recipe: Its layers and limits.
        store: Gives the gates' weight files; without one, paths of this machine and addresses work.

    Raises:
        ConfigError: If a gate cannot be built.
    """
    return RouterSetup({layer.name: build_routed_layer(layer, store=store) for layer in recipe.layers}, recipe.router)


def _gate(recipe: LayerRecipe, policy: Policy, store: WeightsStore | None) -> Gate:
    shape = gate_shape(
        policy, in_features=recipe.gate_features, num_shared=recipe.num_shared, shared_gate=recipe.shared_gate
    )
    return load_gate(recipe.gate, shape, weights=recipe.gate_weights, seed=recipe.gate_seed, store=store)


class RouterProcess:
    """Serves the layers of a runtime over gRPC. Used by one thread at a time; nothing runs before ``start``."""

    def __init__(
        self,
        recipe: RouterRecipe,
        *,
        open_transport: Callable[[], Transport],
        node: str,
        owns_process: bool = False,
        store: WeightsStore | None = None,
    ) -> None:
        """Keep what to serve.

        Args:
            recipe: The layers and limits.
            open_transport: Makes the router's end of the data plane.
            node: Name of the node that it runs on.
            owns_process: Whether nothing but this router lives in the process, so that what is there once it has
                started is there to stay.
            store: Gives the gates' weight files; without one, paths of this machine and addresses work.
        """
        self._owns_process = owns_process
        self._store = store
        self._recipe = recipe
        self._open_transport = open_transport
        self._node = node
        self._closing = threading.Event()
        self._watches: dict[str, TurnWatch] = {}
        self._service: RouterService | None = None
        self._server: RpcServer | None = None
        self._metrics: RouterMetrics | None = None

    def start(self, address: str) -> RouterReport:
        """Build the layers, bind and serve.

        Raises:
            ConfigError: If a gate cannot be built, or a certificate or the tokens cannot be used.
            StartError: If the address cannot be bound.
        """
        setup = build_setup(self._recipe, store=self._store)
        transport = self._open_transport()
        service = RouterService(
            setup.layers,
            transport,
            router=setup.router,
            limits=self._recipe.limits,
            node=self._node,
            needs_table=True,
        )
        try:
            server = self._make_server(service, address)
        except ConfigError:
            service.close()
            raise
        metrics = self._make_metrics(service, server)
        service.start()
        try:
            bound = server.start()
            metrics_address = metrics.start(asked=address, bound=bound)
        except (ConfigError, StartError):
            server.stop(0.0)
            service.close()
            raise
        self._service, self._server, self._metrics = service, server, metrics
        self._watches = {
            "engine": TurnWatch(service.next_turn, limit_s=_MAX_TURN_S),
            "gRPC server": TurnWatch(server.next_turn, limit_s=_MAX_TURN_S),
        }
        if self._owns_process:
            # A collection that looks at all of torch would hold up the answers for a tenth of a second or more.
            gc.collect()
            gc.freeze()
        return RouterReport(bound, transport.public_key, metrics_address)

    def set_table(self, table: RoutingTable) -> None:
        """Route by this table from the next batch on, unless a newer one is there."""
        if self._service is not None:
            self._service.set_table(table)

    def replace_setup(self, setup: RouterSetup, table: RoutingTable) -> None:
        """Serve other layers from the next batch on, by a table that was made for them."""
        if self._service is not None:
            self._service.replace_setup(setup, table)

    def oldest_table_version(self) -> int:
        """The oldest version of the table that a request may still use.

        Raises:
            StartError: If it was never started.
            TimeoutError: If the service is too busy to say so.
        """
        if self._service is None:
            raise StartError("expected a started router to say which tables it uses")
        return self._service.oldest_table_version(_ANSWER_TIMEOUT_S)

    def standstill(self) -> str | None:
        """Which of its threads stands still, in words; None where none does. Never waits."""
        for name, watch in self._watches.items():
            if watch.stands_still():
                return f"its {name} has stood still for more than {_MAX_TURN_S:g} s"
        return None

    def describe(self) -> dict[str, Any]:
        """Layers, experts and replicas, as plain values."""
        return {} if self._service is None else self._service.describe()

    def status(self) -> dict[str, Any]:
        """Counters and load, as plain values."""
        return {} if self._service is None else self._service.status()

    def asked(self, layers: Collection[str]) -> Mapping[str, Mapping[str, int]]:
        """Assignments that each expert of these layers was asked for since the start, by name. Never waits."""
        return {} if self._service is None else self._service.lineup.asked(layers)

    def drain(self, timeout_s: float) -> bool:
        """Not ready from now on; after ``drain_notice_s`` refuse new requests, and wait for those in flight.

        Returns:
            Whether all were answered within ``timeout_s``, the notice included.
        """
        if self._service is None or self._server is None:
            return True
        # Load balancers first: they stop sending before anything is refused.
        self._server.drain()
        notice_s = min(self._recipe.router.drain_notice_s, timeout_s)
        self._closing.wait(notice_s)
        return self._service.drain(timeout_s - notice_s)

    def close(self) -> None:
        """Stop serving; answers that are ready still leave. Safe to call twice."""
        self._closing.set()
        if self._metrics is not None:
            self._metrics.stop()
        if self._server is not None:
            self._server.stop(_GRACE_S)
        if self._service is not None:
            self._service.close()

    def _make_server(self, service: RouterService, address: str) -> RpcServer:
        recipe = self._recipe
        info = {"name": recipe.runtime, "node": self._node}
        return RpcServer(service, address=address, limits=recipe.limits, info=info, security=recipe.security)

    def _make_metrics(self, service: RouterService, server: RpcServer) -> RouterMetrics:
        authorize = None if server.tokens is None else server.tokens.lets_scrape
        return RouterMetrics(service, self._recipe, node=self._node, rpc_counts=server.counts, authorize=authorize)
