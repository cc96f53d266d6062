"""Expert hosts of a benchmark's own, where a suite needs what no deployment offers: two encryptions, or no process."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.bench.deployment import recipe_of
from moe_runtime.bench.library import LibraryLayer
from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.service.routing_table import Replica, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.transport.zmq_host import ZmqHostTransport

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection

    from moe_runtime.launch.recipes import HostSpec
    from moe_runtime.ray_backend.plan import HostReport

#: What hosts call their node; a router that says the same reaches them by ipc, any other one by tcp.
NODE = "bench"


def hosts_of(config: Mapping[str, Any]) -> list[HostSpec]:
    """The expert hosts of a configuration, on the CPU."""
    loaded = load_config(config)
    return list(plan_hosts(loaded.config, build_layers(loaded), gpus_available=False))


def table_of(hosts: Sequence[HostSpec], reports: Sequence[HostReport]) -> RoutingTable:
    """Where the experts of some hosts are, from what the hosts said of themselves."""
    replicas = {
        (hosted.spec.layer, hosted.spec.expert_id): (Replica(hosted.replica_id, report.endpoint),)
        for host, report in zip(hosts, reports, strict=True)
        for hosted in host.experts
    }
    return RoutingTable(1, replicas)


def serve_hosts(connection: Connection, hosts: Sequence[HostSpec]) -> None:
    """Serve some hosts in one process, each with a socket of its own, until the parent closes the connection.

    Says their reports first; then admits each router's public key that it is told.
    """
    with contextlib.ExitStack() as stack:
        processes = [_start(host, stack) for host in hosts]
        connection.send([report for _, report in processes])
        while True:
            (public_key,) = connection.recv()
            for process, _ in processes:
                process.admit([public_key])
            connection.send(None)


@contextlib.contextmanager
def layer_in_process(config: Mapping[str, Any]) -> Iterator[LibraryLayer]:
    """A configuration's only layer, with its experts as a thread of this process, until the end of the ``with``."""
    network = InProcessNetwork()
    hosts = hosts_of(config)
    with contextlib.ExitStack() as stack:
        processes = [
            ExpertProcess(host, open_transport=partial(network.host_transport, node=NODE), num_threads=1)
            for host in hosts
        ]
        for process in processes:
            stack.callback(process.stop)
        table = table_of(hosts, [process.start() for process in processes])
        layer = build_routed_layer(recipe_of(config))
        library = LibraryLayer(layer, table, network.router_transport(), node=NODE)
        yield stack.enter_context(contextlib.closing(library))


def _start(host: HostSpec, stack: contextlib.ExitStack) -> tuple[ExpertProcess, HostReport]:
    torch.set_num_threads(1)
    open_transport = partial(ZmqHostTransport, node=NODE, encryption=host.encryption)
    process = ExpertProcess(host, open_transport=open_transport, num_threads=1)
    stack.callback(process.stop)
    return process, process.start()
