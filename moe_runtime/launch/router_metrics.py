"""The metrics of one router: which port it takes, and the server on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime import __version__
from moe_runtime.errors import StartError
from moe_runtime.metrics.collector import RouterCollector
from moe_runtime.metrics.server import MetricsServer
from moe_runtime.ray_backend.addresses import split_address

if TYPE_CHECKING:
    from moe_runtime.launch.recipes import RouterRecipe
    from moe_runtime.metrics.collector import RpcCounts
    from moe_runtime.metrics.server import Authorize
    from moe_runtime.service.router_service import RouterService


class RouterMetrics:
    """Serves the metrics of a router, unless its configuration gives no address for them.

    Args:
        service: The router.
        recipe: Its configuration.
        node: Name of its node.
        rpc_counts: Calls and errors of its gRPC server.
        authorize: Whether a token is good for a scrape, where the configuration asks for one; None if there are none.
    """

    def __init__(
        self,
        service: RouterService,
        recipe: RouterRecipe,
        *,
        node: str,
        rpc_counts: RpcCounts,
        authorize: Authorize | None,
    ) -> None:
        self._service = service
        self._recipe = recipe
        self._node = node
        self._rpc_counts = rpc_counts
        self._authorize = authorize if recipe.metrics.needs_token(recipe.security) else None
        self._server: MetricsServer | None = None

    def start(self, *, asked: str, bound: str) -> str | None:
        """Bind and serve.

        Args:
            asked: ``HOST:PORT`` that the router was to bind, which says which router of its node it is.
            bound: The one that it has bound.

        Returns:
            The ``host:port`` that was bound; None where no metrics are wanted.

        Raises:
            StartError: If no address can be bound.
        """
        addresses = _addresses(self._recipe, asked)
        for place, address in enumerate(addresses, start=1):
            server = self._serving_at(address, router=bound)
            try:
                metrics_address = server.start()
            except StartError:
                if place == len(addresses):
                    raise
            else:
                self._server = server
                return metrics_address
        return None

    def stop(self) -> None:
        """Stop serving. Safe to call twice."""
        if self._server is not None:
            self._server.stop()

    def _serving_at(self, address: str, *, router: str) -> MetricsServer:
        collector = RouterCollector(
            self._service,
            info={"version": __version__, "runtime": self._recipe.runtime, "node": self._node, "address": router},
            hottest_experts=self._recipe.metrics.hottest_experts,
            rpc_counts=self._rpc_counts,
        )
        return MetricsServer(collector, address=address, authorize=self._authorize)


def _addresses(recipe: RouterRecipe, router_address: str) -> tuple[str, ...]:
    """What the router may bind, in order; one address where it is known which router of its node it is."""
    if recipe.metrics.address is None:
        return ()
    host, port = split_address(recipe.metrics.address)
    first, own = split_address(recipe.router.address)[1], split_address(router_address)[1]
    if not port:
        return (f"{host}:0",)
    if first:
        return (f"{host}:{port + own - first}",)
    return tuple(f"{host}:{port + index}" for index in range(recipe.router.replicas))
