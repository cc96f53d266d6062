"""What crosses the links between the machines of a runtime, and what does not."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cluster.host import Host
from cluster.served import (
    DATA_PORTS,
    LAYER,
    NAME,
    NUM_FEATURES,
    ROUTER_PORT,
    Line,
    Served,
    address_of,
    median_ms,
    some_tokens,
)

ROUTER_PORTS = (ROUTER_PORT, ROUTER_PORT + 1)
ROW_BYTES = NUM_FEATURES * 4
REQUEST_TOKENS, NUM_REQUESTS, NUM_THREADS = 256, 20, 2
#: Headers of TCP/IP, CURVE and the messages, and what asks whether the other end is there.
MAX_RATIO = 1.15
#: What Ray says between two nodes, and what idle connections do, in a test of some seconds.
IDLE_BYTES = 300_000
#: A number that fills rows: wherever a segment begins, it holds the number many times over.
MARK = np.float32(1.2345678)
MARK_TIMES = 8
SNIFFER = Path(__file__).with_name("sniffer.py")
KNOCK = """
import sys
import ray, torch
from moe_runtime.ray_backend.names import NAMESPACE, expert_name
from moe_runtime.service.ports import HostRequest, Segment
from moe_runtime.transport.zmq_router import ZmqTransport
ray.init(address="auto", log_to_driver=False)
name, host_key, layer = sys.argv[1:4]
table = ray.get(ray.get_actor(expert_name(name, host_key), namespace=NAMESPACE).kept.remote(), timeout=30).table
(replica,) = table.replicas[(layer, int(sys.argv[4]))]
stranger = ZmqTransport(node="elsewhere")
rows = torch.ones(1, int(sys.argv[5]))
stranger.send(replica.endpoint, HostRequest(1, (Segment(replica.replica_id, 1),), rows, timeout_s=10.0))
for event in stranger.poll(10.0):
    print(type(event).__name__, event.reason)
"""


@pytest.fixture(autouse=True, scope="module")
def what_runs_now(served: Served) -> None:
    """Tests that lose nodes come before, and leave the description of what ran then."""
    served.look()


@dataclass(frozen=True)
class Crossed:
    """Bytes that crossed links, both ways, headers included.

    Attributes:
        data: By the data plane's ports, per pair of nodes.
        nodes: By any port, per pair of nodes.
        calls: By the routers' ports, per node, to and from the clients' host.
        clients: By any port, per node, to and from the clients' host.
    """

    data: dict[frozenset[str], int]
    nodes: dict[frozenset[str], int]
    calls: dict[str, int]
    clients: dict[str, int]

    def since(self, before: Crossed) -> Crossed:
        """What crossed after ``before`` was counted."""
        now, then = vars(self), vars(before)
        return Crossed(**{kind: {key: now[kind][key] - then[kind][key] for key in now[kind]} for kind in now})


def count(served: Served) -> Crossed:
    nodes, client = nodes_of(served), served.cluster.operator

    def crossed(host: Host, peer: Host, ports: tuple[int, int] | None = None) -> int:
        traffic = host.link_bytes(peer=peer, ports=ports)
        return traffic.sent_bytes + traffic.received_bytes

    pairs = list(combinations(nodes, 2))
    return Crossed(
        data={frozenset({a.name, b.name}): crossed(a, b, DATA_PORTS) for a, b in pairs},
        nodes={frozenset({a.name, b.name}): crossed(a, b) for a, b in pairs},
        calls={node.name: crossed(node, client, ROUTER_PORTS) for node in nodes},
        clients={node.name: crossed(node, client) for node in nodes},
    )


def nodes_of(served: Served) -> tuple[Host, ...]:
    return (served.cluster.head, *served.cluster.workers)


def entrance(served: Served) -> tuple[Host, str]:
    """A node that has a router and experts, and that router's address."""
    for router in served.description["routers"]:
        for node in nodes_of(served):
            if address_of(router["node"]) == node.address and served.experts_on(node):
                return node, router["address"]
    raise AssertionError(f"no router has experts beside it: {served.description}")


def rows_for(lines: list[Line], experts: list[int]) -> int:
    """Rows that some experts served."""
    return sum(line.report["experts"][expert] for line in lines for expert in experts)


def test_tokens_cross_between_routers_and_experts_and_nothing_else_does(served: Served) -> None:
    node, address = entrance(served)
    before = count(served)
    with served.load(
        "crossing",
        addresses=[address],
        num_threads=NUM_THREADS,
        request_tokens=REQUEST_TOKENS,
        max_requests=NUM_REQUESTS,
    ) as ledger:
        lines = ledger.finish()
    crossed = count(served).since(before)
    assert len(lines) == NUM_THREADS * NUM_REQUESTS
    assert all(line.error is None and line.report["is_right"] for line in lines)
    figures = served.figures["bytes on the wire"] = {"least": 0, "data_plane": 0}
    for pair, num_bytes in crossed.data.items():
        far = [host for host in nodes_of(served) if host.name in pair - {node.name}]
        # There and back.
        least = 2 * ROW_BYTES * rows_for(lines, served.experts_on(far[0])) if node.name in pair else 0
        assert least <= num_bytes <= MAX_RATIO * least + IDLE_BYTES
        assert crossed.nodes[pair] - num_bytes < IDLE_BYTES
        figures["least"] += least
        figures["data_plane"] += num_bytes
    figures["ratio"] = figures["data_plane"] / figures["least"]
    figures["other_between_nodes"] = sum(crossed.nodes.values()) - figures["data_plane"]
    assert figures["ratio"] < MAX_RATIO
    called = 2 * ROW_BYTES * REQUEST_TOKENS * len(lines)
    figures["calls_ratio"] = crossed.calls[node.name] / called
    assert 1 < figures["calls_ratio"] < MAX_RATIO
    # Nobody else talks to the client.
    assert sum(crossed.clients.values()) - crossed.calls[node.name] < IDLE_BYTES


def test_tokens_for_experts_beside_the_router_stay_on_the_node(served: Served) -> None:
    node, address = entrance(served)
    chosen = served.experts_of(tokens := some_tokens())
    is_near = np.isin(chosen, served.experts_on(node))
    latencies: dict[str, list[Line]] = {"across hosts": [], "one host": []}
    for name, mine in [("across hosts", ~is_near.any(axis=1)), ("one host", is_near.all(axis=1))] * 2:
        before = count(served)
        with served.load(
            f"p50 {name}", tokens=tokens[mine], addresses=[address], num_threads=1, max_requests=NUM_REQUESTS * 5
        ) as ledger:
            lines = ledger.finish()
        num_bytes = sum(count(served).since(before).data.values())
        assert all(line.error is None and line.report["is_right"] for line in lines)
        num_assignments = sum(line.report["assignments"] for line in lines)
        if name == "one host":
            assert rows_for(lines, served.experts_on(node)) == num_assignments > 0
            assert num_bytes < IDLE_BYTES
        else:
            assert rows_for(lines, served.experts_on(node)) == 0
            assert num_bytes > 2 * ROW_BYTES * num_assignments > 0
        latencies[name] += lines
    served.figures["p50_ms"] = {name: median_ms(lines) for name, lines in latencies.items()}
    # Nor do they go by its loopback: no connection begins and ends at the node's own address.
    for line in node.in_network(["ss", "--tcp", "--numeric", "--no-header"]).splitlines():
        here, there = line.split()[3:5]
        is_data = any(DATA_PORTS[0] <= int(end.rpartition(":")[2]) <= DATA_PORTS[1] for end in (here, there))
        assert not is_data or here.rpartition(":")[0] != there.rpartition(":")[0], line


def test_routers_and_experts_listen_at_their_nodes_address_only(served: Served) -> None:
    num_listeners = 0
    for node in nodes_of(served):
        for line in node.in_network(["ss", "--listening", "--tcp", "--numeric", "--no-header"]).splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if int(port) in ROUTER_PORTS or DATA_PORTS[0] <= int(port) <= DATA_PORTS[1]:
                assert address.strip("[]").removeprefix("::ffff:") == node.address
                num_listeners += 1
    assert num_listeners == len(served.description["routers"]) + len(served.description["hosts"])


def test_tokens_can_be_read_by_nobody_between_the_nodes(served: Served) -> None:
    node, address = entrance(served)
    tokens = some_tokens()
    tokens[:, NUM_FEATURES // 2 :] = MARK
    stop = served.cluster.lab.shared / "sniffer.stop"
    ports = [f"{first}-{last}" for first, last in (DATA_PORTS, ROUTER_PORTS)]
    needle = (np.full(MARK_TIMES, MARK).tobytes()).hex()
    sniffer = node.start(["python", str(SNIFFER), str(stop), needle, *ports], stderr=subprocess.STDOUT)
    assert sniffer.stdout is not None
    assert sniffer.stdout.readline() == "listening\n"
    with served.load(
        "marked", tokens=tokens, addresses=[address], request_tokens=REQUEST_TOKENS, max_requests=5
    ) as ledger:
        lines = ledger.finish()
    stop.touch()
    data, calls = json.loads(sniffer.communicate(timeout=30)[0])
    assert all(line.report["is_right"] for line in lines)
    # Clients speak plain gRPC, so the same look finds the number there.
    assert calls["with_bytes"] > len(lines)
    assert data["segments"] > len(lines)
    assert data["with_bytes"] == 0


def test_a_stranger_on_a_node_gets_nothing_from_an_expert_host_elsewhere(served: Served) -> None:
    hosts = served.description["hosts"]
    stranger = served.cluster.workers[0]
    host = next(host for host in hosts if address_of(host["node"]) != stranger.address)
    expert = next(
        expert["expert_id"]
        for expert in served.description["layers"][LAYER]["experts"]
        if expert["replicas"][0]["replica_id"] in host["replicas"]
    )
    answer = served.cluster.on(stranger, KNOCK, NAME, host["key"], LAYER, str(expert), str(NUM_FEATURES)).stdout
    assert answer.splitlines()[-1] == "HostLost the host does not admit this router's key"
