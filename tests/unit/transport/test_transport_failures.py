"""What both transports guarantee when a peer is gone, wrong, slow or another: run against each of them."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from msgspec.structs import replace

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import Endpoint, HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.zmq_router import ZmqTransport


def test_second_reply_to_a_ticket_is_dropped_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    host.reply(delivery, fabric.make_reply(delivery))
    host.reply(delivery, fabric.make_reply(delivery))
    assert [reply.ticket for reply in fabric.poll(router)] == [1]
    fabric.wait_for_counter(router, router.poll, "num_unexpected", 1)
    fabric.exchange(router, host, 2)


def test_request_for_another_incarnation_is_refused_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    other = replace(host.endpoint, incarnation=host.endpoint.incarnation ^ 1)
    router.send(other, fabric.make_request(1))
    fabric.wait_for_counter(host, host.receive, "num_refused", 1)
    fabric.exchange(router, host, 2)
    assert router.poll(0.0) == []


def test_endpoint_without_an_address_is_a_transport_error(fabric):
    with pytest.raises(TransportError, match=r"at None|cannot be reached"):
        fabric.router().send(Endpoint(1, "elsewhere"), fabric.make_request(1))


def test_rows_that_segments_do_not_account_for_are_a_transport_error(fabric):
    router, host = fabric.router(), fabric.host()
    with pytest.raises(TransportError, match="segments list 3 rows"):
        router.send(host.endpoint, HostRequest(1, (Segment("a", 3),), torch.ones(2, 3), 1.0))
    router.send(host.endpoint, fabric.make_request(2))
    (delivery,) = fabric.receive(host)
    with pytest.raises(TransportError, match="results list 2 rows"):
        host.reply(delivery, HostReply(2, (SegmentResult("a", 2),), None))


def test_reply_to_a_router_that_is_gone_is_discarded_and_counted(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    router.close()
    deadline = time.monotonic() + fabric.deadline_s
    while not host.counters.num_discarded:
        assert time.monotonic() < deadline
        host.reply(delivery, fabric.make_reply(delivery))
        host.receive(0.001)
    fabric.exchange(fabric.router(), host, 2)


def test_retain_drops_what_belongs_to_endpoints_that_left(fabric):
    router, kept, left = fabric.router(), fabric.host(), fabric.host()
    router.send(kept.endpoint, fabric.make_request(1))
    router.send(left.endpoint, fabric.make_request(2))
    (to_kept,), (to_left,) = fabric.receive(kept), fabric.receive(left)
    left.reply(to_left, fabric.make_reply(to_left))
    router.retain([kept.endpoint, Endpoint(1, "never seen")])
    kept.reply(to_kept, fabric.make_reply(to_kept))
    assert [reply.ticket for reply in fabric.poll(router)] == [1]
    assert router.poll(0.0) == []
    fabric.exchange(router, left, 3)


def test_full_queue_is_a_transport_error_and_counted(fabric):
    router, host = fabric.router(), fabric.host()

    def send_many(count):
        for ticket in range(count):
            router.send(host.endpoint, fabric.make_request(ticket, torch.zeros(1, 1 << 18)))

    with pytest.raises(TransportError, match="full"):
        send_many(1000)
    num_sent = router.counters.num_sent
    assert num_sent >= 4
    assert router.counters.num_full == 1
    assert [d.request.ticket for d in fabric.receive(host, num_sent)] == [*range(num_sent)]
    fabric.exchange(router, host, 5000)


def test_closed_ends_stay_closed(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    for end in (router, host):
        end.close()
        end.close()
        end.wake()
    assert router.poll(fabric.deadline_s) == []
    assert host.receive(fabric.deadline_s) == []
    host.reply(delivery, fabric.make_reply(delivery))
    assert host.counters.num_discarded == 1
    with pytest.raises(TransportError, match="closed"):
        router.send(host.endpoint, fabric.make_request(2))


def test_successor_gets_nothing_that_was_queued_for_the_dead(fabric):
    router, dead = fabric.router(), fabric.host()
    fabric.exchange(router, dead, 1)
    dead.close()
    for ticket in (2, 3):
        with contextlib.suppress(TransportError):
            router.send(dead.endpoint, fabric.make_request(ticket))
    successor = fabric.successor(dead.endpoint)
    assert successor.endpoint.incarnation != dead.endpoint.incarnation
    router.send(successor.endpoint, fabric.make_request(4))
    (delivery,) = fabric.receive(successor)
    successor.reply(delivery, fabric.make_reply(delivery))
    assert [reply.ticket for reply in fabric.poll(router)] == [4]


def test_late_answer_to_a_request_that_its_caller_gave_up_is_delivered_once_and_harms_nothing(fabric):
    router, host = fabric.router(), fabric.host()
    rows = torch.ones(64, 1024)
    for ticket in (1, 2, 3):
        router.send(host.endpoint, fabric.make_request(ticket, rows * ticket))
    late, *prompt = fabric.receive(host, 3)
    for delivery in prompt:
        host.reply(delivery, fabric.make_reply(delivery))
    assert {reply.ticket for reply in fabric.poll(router, 2)} == {2, 3}
    host.reply(late, fabric.make_reply(late))
    (reply,) = fabric.poll(router)
    assert reply.ticket == 1
    assert torch.equal(reply.rows, rows)


def test_slow_host_costs_its_own_requests_only(zmq_fabric):
    with contextlib.closing(ZmqTransport(node="node-0", encryption="none", max_outstanding_bytes=1 << 20)) as router:
        slow, quick = zmq_fabric.host(max_queued_messages=100), zmq_fabric.host()
        rows = torch.ones(64, 1024)
        for ticket in range(4):
            router.send(slow.endpoint, zmq_fabric.make_request(ticket, rows))
        with pytest.raises(TransportError, match="the queue to"):
            router.send(slow.endpoint, zmq_fabric.make_request(4, rows))
        zmq_fabric.exchange(router, quick, 5)
        # An answer gives its credit back.
        deliveries = zmq_fabric.receive(slow, 4)
        slow.reply(deliveries[0], zmq_fabric.make_reply(deliveries[0]))
        zmq_fabric.poll(router)
        router.send(slow.endpoint, zmq_fabric.make_request(6, rows))
        assert router.counters.num_full == 1


def test_request_larger_than_all_credit_is_taken_by_a_host_that_has_nothing_to_do(zmq_fabric):
    with contextlib.closing(ZmqTransport(node="node-0", encryption="none", max_outstanding_bytes=1)) as router:
        host = zmq_fabric.host()
        zmq_fabric.exchange(router, host, 1)
        router.send(host.endpoint, zmq_fabric.make_request(2))
        with pytest.raises(TransportError, match="full"):
            router.send(host.endpoint, zmq_fabric.make_request(3))
