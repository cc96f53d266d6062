"""A whole runtime as threads of this process, without Ray: for tests, notebooks and small jobs."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import StartError, UnavailableError
from moe_runtime.launch.balance import LocalBalance, bias_rules
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.local_member import LocalMember, RoutesBoard
from moe_runtime.launch.router_process import RouterProcess, build_setup
from moe_runtime.ray_backend.addresses import router_addresses
from moe_runtime.service.describe import describe_lineup
from moe_runtime.service.lineup import Lineup
from moe_runtime.service.routing_table import Replica, ReplicaState, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.launch.recipes import HostSpec, RouterRecipe
    from moe_runtime.ray_backend.plan import HostReport, RouterReport
    from moe_runtime.service.generations import RouterSetup
    from moe_runtime.service.layer import RoutedLayer


#: Whether routers use an older table.
_LOOK_EVERY_S = 0.02


class InProcessSession:
    """Hosts and routers as threads. Nothing is supervised: what fails stays failed.

    Attributes:
        loaded: The configuration, as it is now.
        changing: Held by whoever changes it.
    """

    def __init__(self, loaded: LoadedConfig, recipe: RouterRecipe, hosts: Sequence[HostSpec]) -> None:
        """Keep what to run.

        Args:
            loaded: The configuration.
            recipe: What the routers serve.
            hosts: The expert hosts.
        """
        self.loaded = loaded
        self.changing = threading.Lock()
        self._closing = threading.Event()
        self._recipe = recipe
        threads = loaded.config.threads
        self._num_threads = None if threads == "auto" else threads
        self._node = socket.gethostname()
        self._network = InProcessNetwork()
        self._routes = RoutesBoard(recipe.runtime)
        self._table = RoutingTable()
        self._hosts = [self._host(spec) for spec in hosts]
        self._routers = [
            RouterProcess(recipe, open_transport=self._network.router_transport, node=self._node)
            for _ in range(recipe.router.replicas)
        ]
        self._reports: list[RouterReport] = []
        self._balance: LocalBalance | None = None

    def start(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Build and start everything; what was started is stopped again if something fails.

        Raises:
            ConfigError: If an expert or a gate cannot be built.
            StartError: If an address cannot be bound, or an expert is to run on a GPU and there is none.
        """
        try:
            self._start(on_progress or _ignore)
        except BaseException:
            self.close(drain_timeout_s=0.0)
            raise

    def addresses(self) -> list[str]:
        """Where clients find the routers."""
        return [report.address for report in self._reports]

    def describe(self) -> dict[str, Any]:
        """Layers, hosts and routers, as plain values."""
        return {
            "name": self._recipe.runtime,
            "addresses": self.addresses(),
            "hosts": [self._describe_host(host) for host in self._hosts],
            "routers": [
                {
                    "index": i,
                    "address": report.address,
                    "metrics_address": report.metrics_address,
                    "state": str(ReplicaState.READY),
                    "pid": os.getpid(),
                }
                for i, report in enumerate(self._reports)
            ],
            **self._describe_layers(),
        }

    def join(self) -> LocalMember:
        """A place for a program of this process among those who route."""
        self._routes.post(self._table, self._layers)
        return LocalMember(self._routes, self._network.router_transport(), node=self._node)

    def dismiss(self, reason: str) -> None:
        """End the memberships of this program, whose callers are told the reason."""
        self._routes.close(reason)

    def change(
        self,
        loaded: LoadedConfig,
        recipe: RouterRecipe,
        specs: Sequence[HostSpec],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run by another configuration, which has the same routers; hosts that are the same in both are left alone.

        Args:
            loaded: The configuration.
            recipe: What the routers serve.
            specs: The expert hosts.
            on_progress: Called with the number of hosts that are ready, and of all that there will be.

        Raises:
            ConfigError: If an expert cannot be built; then nothing has changed.
            StartError: If it is to run on a GPU and there is none; then, too.
            UnavailableError: If it was closed.
        """
        if self._closing.is_set():
            raise UnavailableError(f"runtime {self._recipe.runtime}: it was closed")
        present = {host.spec.host_id: host for host in self._hosts}
        hosts = [
            host if (host := present.get(spec.host_id)) is not None and host.spec == spec else self._host(spec)
            for spec in specs
        ]
        new, old = ([host for host in a if host not in b] for a, b in ((hosts, self._hosts), (self._hosts, hosts)))
        try:
            setup = build_setup(recipe)
            for num_ready, host in enumerate(new, start=len(hosts) - len(new) + 1):
                host.start()
                (on_progress or _ignore)(num_ready, len(hosts))
        except BaseException:
            for host in new:
                host.process.stop()
            raise
        self.loaded, self._recipe, self._hosts = loaded, recipe, hosts
        self._follow(setup)
        self._await_let_go()
        for host in old:
            host.process.stop()

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Threads of this process are not lost before it is: the callback is never called."""

    def close(self, *, drain_timeout_s: float) -> bool:
        """Drain, then stop everything; whether every request was answered. Safe to call twice."""
        self._closing.set()
        if self._balance is not None:
            self._balance.stop()
        self.dismiss("it was closed")
        # Side by side: one that waits for its last request would leave the others no time.
        with ThreadPoolExecutor(max(1, len(self._routers))) as drains:
            drained = list(drains.map(lambda router: router.drain(drain_timeout_s), self._routers))
        for router in self._routers:
            router.close()
        for host in self._hosts:
            host.process.stop()
        return all(drained)

    def _start(self, on_progress: Callable[[int, int], None]) -> None:
        num_actors = len(self._hosts) + len(self._routers)
        for num_ready, host in enumerate(self._hosts, start=1):
            host.start()
            on_progress(num_ready, num_actors)
        self._table = _table(1, self._hosts)
        addresses = router_addresses(self._recipe.router.address, [self._node] * len(self._routers))
        for router, address in zip(self._routers, addresses, strict=True):
            self._reports.append(router.start(address))
            router.set_table(self._table)
        self._start_balance()
        on_progress(num_actors, num_actors)

    def _start_balance(self) -> None:
        self._balance = LocalBalance(bias_rules(self._recipe.layers), routers=self._routers, table=self._table)
        self._balance.start()

    def _follow(self, setup: RouterSetup) -> None:
        """Have everybody route by the present hosts, and what a new setup says."""
        if self._balance is not None:
            self._balance.stop()
            self._table = self._balance.table
        # Biases start anew, as after a restart.
        self._table = _table(self._table.version + 1, self._hosts)
        for router in self._routers:
            router.replace_setup(setup, self._table)
        self._layers = setup.layers
        self._routes.post(self._table, setup.layers)
        self._start_balance()

    def _await_let_go(self) -> None:
        """Return when nobody uses an older table than the present one, or has not let go of it in time."""
        version = self._table.version
        let_go_s = max((layer.timeout_s for layer in self._recipe.layers), default=0.0)
        self._routes.await_let_go(version, timeout_s=let_go_s)
        give_up_at = time.monotonic() + let_go_s
        for router in self._routers:
            while router.oldest_table_version() < version and time.monotonic() < give_up_at:
                self._closing.wait(_LOOK_EVERY_S)

    def _host(self, spec: HostSpec) -> _LocalHost:
        process = ExpertProcess(
            spec,
            open_transport=partial(self._network.host_transport, node=self._node),
            num_threads=self._num_threads,
            node=self._node,
            find_routers=self.addresses,
        )
        return _LocalHost(spec, process)

    @cached_property
    def _layers(self) -> Mapping[str, RoutedLayer]:
        """What a router of this process that is no ``RouterProcess`` knows of the layers."""
        return build_setup(self._recipe).layers

    def _describe_layers(self) -> dict[str, Any]:
        if self._routers:
            return self._routers[0].describe()
        return describe_lineup(replace(Lineup.of(self._layers), table=self._table))

    def _describe_host(self, host: _LocalHost) -> dict[str, Any]:
        return {
            "host_id": host.spec.host_id,
            "state": str(ReplicaState.READY),
            "health": asdict(host.process.health()),
            "node": self._node,
            "pid": os.getpid(),
            "replicas": [hosted.replica_id for hosted in host.spec.experts],
        }


@dataclass(eq=False)
class _LocalHost:
    """A host of this process, and what it said of itself when it started."""

    spec: HostSpec
    process: ExpertProcess
    report: HostReport | None = None

    def start(self) -> None:
        """Build and serve.

        Raises:
            ConfigError: If an expert cannot be built.
            StartError: If it is to run on a GPU and there is none.
        """
        if self.spec.device == "cuda" and not torch.cuda.is_available():
            raise StartError(f"{self.spec.host_id}: expected a GPU that torch can use, found none; set `device: cpu`")
        self.report = self.process.start()


def _table(version: int, hosts: Iterable[_LocalHost]) -> RoutingTable:
    replicas: dict[tuple[str, int], tuple[Replica, ...]] = {}
    for host in hosts:
        for hosted in host.spec.experts:
            if host.report is not None:
                key = (hosted.spec.layer, hosted.spec.expert_id)
                replicas[key] = (*replicas.get(key, ()), _replica(hosted.replica_id, host.report))
    return RoutingTable(version, replicas)


def _replica(replica_id: str, report: HostReport) -> Replica:
    return Replica(
        replica_id=replica_id,
        endpoint=report.endpoint,
        weights_version=report.weights_versions[replica_id],
        device=report.device,
        pid=os.getpid(),
    )


def _ignore(_num_ready: int, _num_actors: int) -> None:
    """Nobody wants to know."""
