"""Fabrics: routers and hosts on each transport, and the steps that tests take with them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostLost, HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.transport.zmq_host import ZmqHostTransport
from moe_runtime.transport.zmq_router import ZmqTransport


class Steps:
    """What tests do with any transport; every wait has a deadline."""

    deadline_s = 20.0

    def make_request(self, ticket, rows=None):
        rows = torch.ones(2, 3) if rows is None else rows
        return HostRequest(ticket, (Segment("layer/expert/0", rows.shape[0]),), rows, timeout_s=5.0)

    def make_reply(self, delivery, rows=None):
        request = delivery.request
        results = tuple(SegmentResult(s.replica_id, s.num_rows, None, 0.5) for s in request.segments)
        return HostReply(request.ticket, results, request.rows if rows is None else rows)

    def receive(self, host, count=1):
        """The next deliveries of a host."""
        return self._collect(host.receive, count)

    def poll(self, router, count=1):
        """The next replies of a router."""
        return self._collect(router.poll, count)

    def wait_for_counter(self, transport, wait, name, value):
        """Let a transport work until one of its counters has a value; nothing else may arrive meanwhile."""
        deadline = time.monotonic() + self.deadline_s
        while getattr(transport.counters, name) < value:
            assert time.monotonic() < deadline, f"{name}: expected {value}, found {transport.counters}"
            assert wait(0.05) == []
        assert getattr(transport.counters, name) == value

    def exchange(self, router, host, ticket):
        """One request there and back; what was sent before on the same way has arrived by then, or never will."""
        router.send(host.endpoint, self.make_request(ticket))
        self.answer_next(router, host, ticket)

    def answer_next(self, router, host, ticket):
        """The answer to a request that was sent, there and back."""
        (delivery,) = self.receive(host)
        host.reply(delivery, self.make_reply(delivery))
        (reply,) = self.poll(router)
        assert delivery.request.ticket == reply.ticket == ticket

    def send_when_reached(self, router, endpoint, request, *, host=None):
        """Send to a host that was lost: what comes before it has answered the handshake is refused at once.

        A host of this process answers while it receives.
        """
        deadline = time.monotonic() + self.deadline_s
        while True:
            with contextlib.suppress(TransportError):
                return router.send(endpoint, request)
            assert time.monotonic() < deadline
            assert router.poll(0.01) == []
            assert host is None or host.receive(0.01) == []

    def _collect(self, wait, count):
        found = []
        deadline = time.monotonic() + self.deadline_s
        while len(found) < count:
            remaining_s = deadline - time.monotonic()
            assert remaining_s > 0, f"expected {count} messages, found {found}"
            found += [message for message in wait(remaining_s) if not isinstance(message, HostLost)]
        assert len(found) == count
        return found


class InProcessFabric(Steps):
    """Routers and hosts on one in-process network."""

    def __init__(self, stack):
        self._stack = stack
        self._network = InProcessNetwork(max_queued_messages=4)

    def router(self):
        return self._stack.enter_context(contextlib.closing(self._network.router_transport()))

    def host(self):
        return self._stack.enter_context(contextlib.closing(self._network.host_transport()))

    def successor(self, endpoint):
        host = self._network.host_transport(address=endpoint.local)
        return self._stack.enter_context(contextlib.closing(host))


class ZmqFabric(Steps):
    """Routers and hosts on ZeroMQ; routers are on the hosts' node, or on another."""

    def __init__(self, stack, *, router_node, encryption="none"):
        self._stack = stack
        self._router_node = router_node
        self.encryption = encryption
        self._routers = []
        self._hosts = []
        # Not tmp_path: its paths exceed what a Unix socket allows.
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp")))

    def router(self):
        router = ZmqTransport(node=self._router_node, encryption=self.encryption, max_queued_messages=4)
        self._routers.append(router)
        self._admit_all()
        return self._stack.enter_context(contextlib.closing(router))

    def host(self, **options):
        defaults = {"node": "node-0", "folder": self.folder, "encryption": self.encryption, "max_queued_messages": 4}
        host = self._stack.enter_context(contextlib.closing(ZmqHostTransport(**defaults | options)))
        self._hosts.append(host)
        self._admit_all()
        return host

    def _admit_all(self):
        for host in self._hosts:
            host.admit([router.public_key for router in self._routers if router.public_key is not None])

    def successor(self, endpoint):
        port = int(endpoint.remote.rpartition(":")[2])
        return self.host(port_range=(port, port))


ZMQ_FABRICS = {
    "ipc": {"router_node": "node-0"},
    "tcp": {"router_node": "node-1"},
    "curve": {"router_node": "node-1", "encryption": "curve"},
}


@pytest.fixture(params=["in_process", *ZMQ_FABRICS])
def fabric(request):
    with contextlib.ExitStack() as stack:
        if request.param == "in_process":
            yield InProcessFabric(stack)
        else:
            yield ZmqFabric(stack, **ZMQ_FABRICS[request.param])


@pytest.fixture
def ipc_fabric():
    with contextlib.ExitStack() as stack:
        yield ZmqFabric(stack, **ZMQ_FABRICS["ipc"])


@pytest.fixture
def tcp_fabric():
    with contextlib.ExitStack() as stack:
        yield ZmqFabric(stack, **ZMQ_FABRICS["tcp"])


@pytest.fixture
def curve_fabric():
    with contextlib.ExitStack() as stack:
        yield ZmqFabric(stack, **ZMQ_FABRICS["curve"])


@pytest.fixture(params=["ipc", "tcp"])
def zmq_fabric(request):
    with contextlib.ExitStack() as stack:
        yield ZmqFabric(stack, **ZMQ_FABRICS[request.param])


@pytest.fixture
def ipc_folder():
    """A private folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp") as folder:
        yield Path(folder)
