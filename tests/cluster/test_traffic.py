"""What crosses the links between the machines of a runtime, and what does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from cluster.host import Host
from cluster.served import (
    DATA_PORTS,
    LAYER,
    NAME,
    NUM_FEATURES,
    NUM_TOKENS,
    ROUTER_PORT,
    Line,
    Served,
    median_ms,
)

ROUTER_PORTS = (ROUTER_PORT, ROUTER_PORT + 1)
ROW_BYTES = NUM_FEATURES * 4
REQUEST_TOKENS = 256
#: TCP/IP and CURVE add to each segment and each frame of 40 kB; heartbeats come on top.
MAX_RATIO = 1.15
#: What Ray's own processes say to each other in a test of some seconds.
MAX_OTHER_SHARE = 0.2
#: One number many times over is in tokens at every offset that a segment may begin with.
MARK = np.float32(1.2345678)
SNIFFER = Path(__file__).with_name("sniffer.py")
KNOCK = """
import sys
import ray, torch
from moe_runtime.ray_backend.names import NAMESPACE, expert_name
from moe_runtime.service.ports import HostRequest, Segment
from moe_runtime.transport.zmq_router import ZmqTransport
ray.init(address="auto", log_to_driver=False)
name, host_id, layer = sys.argv[1:4]
table = ray.get(ray.get_actor(expert_name(name, host_id), namespace=NAMESPACE).kept.remote(), timeout=30).table
(replica,) = table.replicas[(layer, int(sys.argv[4]))]
stranger = ZmqTransport(node="elsewhere")
stranger.send(replica.endpoint, HostRequest(1, (Segment(replica.replica_id, 1),), torch.ones(1, 128), timeout_s=10.0))
for event in stranger.poll(10.0):
    print(type(event).__name__, event.reason)
"""


@dataclass(frozen=True)
class Bytes:
    """What crossed the links of a cluster in some time, in both directions, headers included.

    Attributes:
        data: Per pair of nodes, by the data plane's ports.
        total: Per pair of nodes, everything.
        clients: Per node, to and from the clients by the routers' ports.
        clients_total: Per node, to and from the clients, everything.
    """

    data: dict[tuple[str, str], int]
    total: dict[tuple[str, str], int]
    clients: dict[str, int]
    clients_total: dict[str, int]


def count(served: Served) -> Bytes:
    nodes, client = nodes_of(served), served.cluster.operator

    def crossed(host: Host, peer: Host, ports: tuple[int, int] | None = None) -> int:
        traffic = host.link_bytes(peer=peer, ports=ports)
        return traffic.sent_bytes + traffic.received_bytes

    pairs = [(a, b) for a, b in permutations(nodes, 2) if a.name < b.name]
    return Bytes(
        {(a.name, b.name): crossed(a, b, DATA_PORTS) for a, b in pairs},
        {(a.name, b.name): crossed(a, b) for a, b in pairs},
        {node.name: crossed(node, client, ROUTER_PORTS) for node in nodes},
        {node.name: crossed(node, client) for node in nodes},
    )


def nodes_of(served: Served) -> tuple[Host, ...]:
    return (served.cluster.head, *served.cluster.workers)
