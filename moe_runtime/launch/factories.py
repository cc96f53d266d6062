"""What the actors are given: picklable makers of their processes, on the ZeroMQ transport."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.router_process import RouterProcess, build_setup
from moe_runtime.logs import LogIdentity, LogSettings, install
from moe_runtime.ray_backend.interfaces import address_in
from moe_runtime.service.describe import describe_lineup
from moe_runtime.service.lineup import Lineup
from moe_runtime.transport.ipc_folder import default_ipc_folder, sweep_ipc
from moe_runtime.transport.zmq_host import ZmqHostTransport
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_runtime.launch.recipes import HostSpec, RouterRecipe
    from moe_runtime.launch.weights_recipe import WeightsRecipe
    from moe_runtime.ray_backend.plan import Location
    from moe_runtime.service.generations import RouterSetup
    from moe_runtime.service.routing_table import RoutingTable


@dataclass(frozen=True)
class ExpertProcessFactory:
    """Makes one expert host's process where its actor runs."""

    spec: HostSpec
    weights: WeightsRecipe | None = None
    runtime: str = ""
    logging: LogSettings = field(default_factory=LogSettings)

    def __call__(self, location: Location, *, num_threads: int) -> ExpertProcess:
        """The process, not yet started; from now on its logs are written as configured."""
        install(self.logging, LogIdentity("expert", self.runtime, location.node))
        open_transport = partial(_open_host_transport, location, self.spec)
        return ExpertProcess(
            self.spec,
            open_transport=open_transport,
            num_threads=num_threads,
            owns_process=True,
            store=None if self.weights is None else self.weights.store(),
            node=location.node,
            find_routers=_router_lookup(self.runtime),
        )


@dataclass(frozen=True)
class RouterProcessFactory:
    """Makes a router's process where its actor runs."""

    recipe: RouterRecipe
    weights: WeightsRecipe | None = None
    logging: LogSettings = field(default_factory=LogSettings)

    def __call__(self, location: Location) -> RouterProcess:
        """The process, not yet started; from now on its logs are written as configured."""
        install(self.logging, LogIdentity("router", self.recipe.runtime, location.node))
        # A router's products are small: threads of its own would wait for each other, and for the experts'.
        torch.set_num_threads(1)
        return RouterProcess(
            self.recipe,
            open_transport=partial(self.open_transport, location),
            node=location.node,
            owns_process=True,
            store=None if self.weights is None else self.weights.store(),
        )

    def open_transport(self, location: Location) -> ZmqTransport:
        """A router's end of the data plane."""
        return ZmqTransport(node=location.node, encryption=self.recipe.encryption)

    def describe(self, table: RoutingTable) -> dict[str, Any]:
        """What a router that serves would say of its layers, by a table."""
        return describe_lineup(replace(Lineup.of(self.prepare().layers), table=table))

    def prepare(self) -> RouterSetup:
        """What a router that runs needs to serve the same.

        Raises:
            ConfigError: If a gate cannot be built.
        """
        return build_setup(self.recipe, store=None if self.weights is None else self.weights.store())


def _router_lookup(runtime: str) -> Callable[[], Sequence[str]]:
    # Only in an actor: the import brings Ray.
    from moe_runtime.ray_backend.router_lookup import RouterLookup

    return RouterLookup(runtime)


def _open_host_transport(location: Location, spec: HostSpec) -> ZmqHostTransport:
    # Every node is swept by the hosts that start there: the controller reaches its own node only.
    sweep_ipc(default_ipc_folder())
    ip = location.ip
    if spec.network is not None:
        ip = address_in(spec.network, known=ip, node=location.node)
    return ZmqHostTransport(node=location.node, ip=ip, port_range=spec.port_range, encryption=spec.encryption)
