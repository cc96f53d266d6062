"""What both transports guarantee: the ports' contracts, run against each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import (
    Endpoint,
    HostLost,
    HostReply,
    HostRequest,
    Segment,
    SegmentResult,
)
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.transport.zmq_host import ZmqHostTransport
from moe_runtime.transport.zmq_router import ZmqTransport

DEADLINE_S = 20.0
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class InProcessFabric:
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


class ZmqFabric:
    """Routers and hosts on ZeroMQ; routers are on the hosts' node, or on another."""

    def __init__(self, stack, *, router_node):
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp")))
        self._router_node = router_node

    def router(self):
        router = ZmqTransport(node=self._router_node, max_queued_messages=4)
        return self._stack.enter_context(contextlib.closing(router))

    def host(self, port_range=None):
        host = ZmqHostTransport(node="node-0", folder=self._folder, port_range=port_range, max_queued_messages=4)
        return self._stack.enter_context(contextlib.closing(host))

    def successor(self, endpoint):
        port = int(endpoint.remote.rpartition(":")[2])
        return self.host((port, port))


@pytest.fixture(params=["in_process", "zmq_ipc", "zmq_tcp"])
def fabric(request):
    with contextlib.ExitStack() as stack:
        if request.param == "in_process":
            yield InProcessFabric(stack)
        else:
            yield ZmqFabric(stack, router_node="node-0" if request.param == "zmq_ipc" else "node-1")


def make_request(ticket, rows=None, replica_id="layer/expert/0"):
    rows = torch.ones(2, 3) if rows is None else rows
    return HostRequest(ticket, (Segment(replica_id, rows.shape[0]),), rows, timeout_s=5.0)


def make_reply(delivery, rows=None):
    request = delivery.request
    results = tuple(SegmentResult(s.replica_id, s.num_rows, None, 0.5) for s in request.segments)
    return HostReply(request.ticket, results, request.rows if rows is None else rows)


def receive(host, count=1):
    """The next deliveries of a host, within the deadline."""
    return _collect(host.receive, count)


def poll(router, count=1):
    """The next messages of a router, within the deadline."""
    return _collect(router.poll, count)


def _collect(wait, count):
    found = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        remaining_s = deadline - time.monotonic()
        assert remaining_s > 0, f"expected {count} messages, found {found}"
        found += [message for message in wait(remaining_s) if not isinstance(message, HostLost)]
    assert len(found) == count
    return found


def wait_for_counter(transport, wait, name, value):
    """Let a transport work until one of its counters has a value."""
    deadline = time.monotonic() + DEADLINE_S
    while getattr(transport.counters, name) < value:
        remaining_s = deadline - time.monotonic()
        assert remaining_s > 0, f"{name}: expected {value}, found {transport.counters}"
        assert wait(min(remaining_s, 0.05)) == []
    assert getattr(transport.counters, name) == value


def exchange(router, host, ticket):
    """One request there and back, which shows that everything sent before it has arrived or never will."""
    router.send(host.endpoint, make_request(ticket))
    (delivery,) = receive(host)
    host.reply(delivery, make_reply(delivery))
    (reply,) = poll(router)
    assert delivery.request.ticket == reply.ticket == ticket


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5, 2, 3), (300, 64)])
def test_rows_arrive_and_come_back_bit_for_bit(fabric, dtype, shape):
    router, host = fabric.router(), fabric.host()
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    request = HostRequest(2**63, (Segment("a", 0), Segment("b/1", shape[0])), rows, timeout_s=1.5)
    router.send(host.endpoint, request)
    (delivery,) = receive(host)
    assert delivery.request.ticket == 2**63
    assert delivery.request.segments == request.segments
    assert delivery.request.timeout_s == 1.5
    assert delivery.request.rows.dtype == dtype
    assert torch.equal(delivery.request.rows, rows)

    outputs = rows.flatten(1)[:, :1] * 2
    results = (SegmentResult("a", 0, "gone: größer", 0.0), SegmentResult("b/1", shape[0], None, 0.25))
    host.reply(delivery, HostReply(2**63, results, outputs))
    (reply,) = poll(router)
    assert reply.ticket == 2**63
    assert reply.results == results
    assert reply.rows.dtype == dtype
    assert torch.equal(reply.rows, outputs)


def test_reply_without_good_rows_has_none(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, make_request(1))
    (delivery,) = receive(host)
    result = SegmentResult("layer/expert/0", 2, "it raised", 0.0)
    host.reply(delivery, HostReply(1, (result,), None))
    (reply,) = poll(router)
    assert reply == HostReply(1, (result,), None)


def test_rows_that_need_grad_or_are_strided_travel(fabric):
    router, host = fabric.router(), fabric.host()
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    router.send(host.endpoint, make_request(1, base.t()))
    (delivery,) = receive(host)
    assert torch.equal(delivery.request.rows, base.t())


def test_rows_made_in_inference_mode_come_back_usable_by_autograd(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, make_request(1))
    (delivery,) = receive(host)
    with torch.inference_mode():
        outputs = torch.full((2, 3), 3.0)
    host.reply(delivery, make_reply(delivery, outputs))
    (reply,) = poll(router)
    weight = torch.ones((), requires_grad=True)
    (reply.rows * weight).sum().backward()
    assert weight.grad == 18.0


def test_one_host_answers_each_of_many_routers_its_own(fabric):
    host = fabric.host()
    routers = [fabric.router() for _ in range(4)]
    for index, router in enumerate(routers):
        router.send(host.endpoint, make_request(7, torch.full((1, 2), float(index))))
    for delivery in receive(host, 4):
        host.reply(delivery, make_reply(delivery, delivery.request.rows + 10))
    for index, router in enumerate(routers):
        (reply,) = poll(router)
        assert reply.ticket == 7
        assert torch.equal(reply.rows, torch.full((1, 2), index + 10.0))


def test_one_router_hears_from_many_hosts(fabric):
    router = fabric.router()
    hosts = [fabric.host() for _ in range(4)]
    for ticket, host in enumerate(hosts):
        router.send(host.endpoint, make_request(ticket))
    for host in hosts:
        (delivery,) = receive(host)
        host.reply(delivery, make_reply(delivery))
    assert {reply.ticket for reply in poll(router, 4)} == {0, 1, 2, 3}


def test_replies_may_come_in_any_order(fabric):
    router, host = fabric.router(), fabric.host()
    for ticket in (1, 2, 3):
        router.send(host.endpoint, make_request(ticket))
    for delivery in reversed(receive(host, 3)):
        host.reply(delivery, make_reply(delivery))
    assert [reply.ticket for reply in poll(router, 3)] == [3, 2, 1]


def test_second_reply_to_a_ticket_is_dropped_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, make_request(1))
    (delivery,) = receive(host)
    host.reply(delivery, make_reply(delivery))
    host.reply(delivery, make_reply(delivery))
    assert [reply.ticket for reply in poll(router)] == [1]
    wait_for_counter(router, router.poll, "num_unexpected", 1)
    exchange(router, host, 2)


@pytest.mark.parametrize("end", ["router", "host"])
def test_wake_before_a_wait_makes_it_return_at_once(fabric, end):
    transport = getattr(fabric, end)()
    wait = transport.poll if end == "router" else transport.receive
    transport.wake()
    transport.wake()
    started = time.monotonic()
    assert wait(DEADLINE_S) == []
    assert time.monotonic() - started < DEADLINE_S / 2
    assert wait(0.0) == []


@pytest.mark.parametrize("end", ["router", "host"])
def test_wake_from_another_thread_ends_a_wait(fabric, end):
    transport = getattr(fabric, end)()
    wait = transport.poll if end == "router" else transport.receive
    timer = threading.Timer(0.05, transport.wake)
    timer.start()
    started = time.monotonic()
    assert wait(DEADLINE_S) == []
    timer.join()
    assert time.monotonic() - started < DEADLINE_S / 2


def test_waits_end_when_their_time_is_up(fabric):
    assert fabric.router().poll(0.001) == []
    assert fabric.host().receive(0.001) == []


def test_request_for_another_incarnation_is_refused_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    other = dataclasses.replace(host.endpoint, incarnation=host.endpoint.incarnation ^ 1)
    router.send(other, make_request(1))
    wait_for_counter(host, host.receive, "num_refused", 1)
    exchange(router, host, 2)
    assert router.poll(0.0) == []


def test_endpoint_without_an_address_is_a_transport_error(fabric):
    with pytest.raises(TransportError, match=r"at None|cannot be reached"):
        fabric.router().send(Endpoint(1, "elsewhere"), make_request(1))


def test_rows_that_segments_do_not_account_for_are_a_transport_error(fabric):
    router, host = fabric.router(), fabric.host()
    with pytest.raises(TransportError, match="segments list 3 rows"):
        router.send(host.endpoint, HostRequest(1, (Segment("a", 3),), torch.ones(2, 3), 1.0))
    router.send(host.endpoint, make_request(2))
    (delivery,) = receive(host)
    with pytest.raises(TransportError, match="results list 2 good rows"):
        host.reply(delivery, HostReply(2, (SegmentResult("a", 2),), None))


def test_reply_to_a_router_that_is_gone_is_discarded_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, make_request(1))
    (delivery,) = receive(host)
    router.close()
    deadline = time.monotonic() + DEADLINE_S
    while not host.counters.num_discarded:
        assert time.monotonic() < deadline
        host.reply(delivery, make_reply(delivery))
        host.receive(0.001)
    exchange(fabric.router(), host, 2)


def test_retain_drops_what_belongs_to_endpoints_that_left(fabric):
    router, kept, left = fabric.router(), fabric.host(), fabric.host()
    router.send(kept.endpoint, make_request(1))
    router.send(left.endpoint, make_request(2))
    (to_kept,), (to_left,) = receive(kept), receive(left)
    left.reply(to_left, make_reply(to_left))
    router.retain([kept.endpoint, Endpoint(1, "never seen")])
    kept.reply(to_kept, make_reply(to_kept))
    assert [reply.ticket for reply in poll(router)] == [1]
    assert router.poll(0.0) == []
    exchange(router, left, 3)


def test_full_queue_is_a_transport_error_and_counted(fabric):
    router, host = fabric.router(), fabric.host()

    def send_many(count):
        for ticket in range(count):
            router.send(host.endpoint, make_request(ticket, torch.zeros(1, 1 << 18)))

    with pytest.raises(TransportError, match="full"):
        send_many(1000)
    num_sent = router.counters.num_sent
    assert num_sent >= 4
    assert router.counters.num_full == 1
    assert [d.request.ticket for d in receive(host, num_sent)] == [*range(num_sent)]
    exchange(router, host, 5000)


def test_closed_ends_stay_closed(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, make_request(1))
    (delivery,) = receive(host)
    for end in (router, host):
        end.close()
        end.close()
        end.wake()
    assert router.poll(DEADLINE_S) == []
    assert host.receive(DEADLINE_S) == []
    host.reply(delivery, make_reply(delivery))
    assert host.counters.num_discarded == 1
    with pytest.raises(TransportError, match="closed"):
        router.send(host.endpoint, make_request(2))


def test_successor_gets_nothing_that_was_queued_for_the_dead(fabric):
    router, dead = fabric.router(), fabric.host()
    exchange(router, dead, 1)
    dead.close()
    for ticket in (2, 3):
        with contextlib.suppress(TransportError):
            router.send(dead.endpoint, make_request(ticket))
    successor = fabric.successor(dead.endpoint)
    assert successor.endpoint.incarnation != dead.endpoint.incarnation
    router.send(successor.endpoint, make_request(4))
    (delivery,) = receive(successor)
    successor.reply(delivery, make_reply(delivery))
    assert [reply.ticket for reply in poll(router)] == [4]


def test_requests_from_many_threads_are_answered_once_each(fabric):
    host = fabric.host()
    stopping = threading.Event()

    def serve():
        while not stopping.is_set():
            for delivery in host.receive(DEADLINE_S):
                host.reply(delivery, make_reply(delivery, delivery.request.rows * 2))

    def call(router, base):
        for ticket in range(base, base + 50):
            router.send(host.endpoint, make_request(ticket, torch.full((1, 1), float(ticket))))
            (reply,) = poll(router)
            answered.append((ticket, reply.ticket, reply.rows.item()))

    answered = []
    server = threading.Thread(target=serve)
    server.start()
    callers = [threading.Thread(target=call, args=(fabric.router(), base)) for base in (0, 1000, 2000)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    stopping.set()
    host.wake()
    server.join(DEADLINE_S)
    assert sorted(answered) == [(t, t, t * 2.0) for base in (0, 1000, 2000) for t in range(base, base + 50)]
