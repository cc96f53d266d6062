"""The door of a host: short messages that pass through it, and visitors who are no routers of this runtime."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import zmq

from moe_runtime.service.ports import HostLost
from moe_runtime.transport.header import encode_request
from moe_runtime.transport.header_fields import Address, Place
from moe_runtime.transport.near_channel import ANSWER, OFFER, ROUTE_BYTES
from moe_runtime.transport.shared_memory import create_segment
from moe_runtime.transport.zmq_router import ZmqTransport

PAGE = 4096
ROUTE = b"r" * ROUTE_BYTES


def door_of(host):
    return Path(host.endpoint.local.removeprefix("ipc://")).with_suffix(".shm")


@pytest.fixture
def visitor(ipc_fabric):
    """A host, and a bare socket that has come through its door."""
    host = ipc_fabric.host()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bare:
        bare.settimeout(ipc_fabric.deadline_s)
        bare.connect(str(door_of(host)))
        yield host, bare
    ipc_fabric.exchange(ipc_fabric.router(), host, 1000)


def serve_until_answered(host, bare):
    bare.setblocking(False)
    while True:
        assert host.receive(0.01) == []
        try:
            return bare.recv(100)
        except BlockingIOError:
            continue


@pytest.mark.parametrize("packet", [b"", b"x", OFFER.pack(1, PAGE), b"x" * 1000, b"x" * 100_000])
@pytest.mark.parametrize("introduction", [(), (ROUTE,)])
def test_visitor_who_sends_garbage_is_shown_out(visitor, introduction, packet):
    host, bare = visitor
    for each in (*introduction, packet):
        bare.send(each)
    assert serve_until_answered(host, bare) == b""
    assert host.counters.num_malformed == (1 if introduction and packet else 0)


def test_visitor_who_offers_memory_before_it_said_who_it_is_is_shown_out(visitor):
    host, bare = visitor
    descriptor, _ = create_segment(PAGE)
    socket.send_fds(bare, [OFFER.pack(1, PAGE)], [descriptor])
    os.close(descriptor)
    assert serve_until_answered(host, bare) == b""


def test_visitor_who_offers_memory_that_could_shrink_is_told_that_it_is_no_use(visitor):
    host, bare = visitor
    bare.send(ROUTE)
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    socket.send_fds(bare, [OFFER.pack(1, PAGE)], [descriptor])
    os.close(descriptor)
    assert serve_until_answered(host, bare) == ANSWER.pack(1, False)


@pytest.mark.parametrize("place", [Place(99, 0, PAGE), Place(5, PAGE, PAGE), Place(5, 1, PAGE), Place(5, 0, 8)])
def test_request_that_names_memory_which_is_not_there_is_counted_as_malformed(ipc_fabric, visitor, place):
    host, bare = visitor
    bare.send(ROUTE)
    descriptor, _ = create_segment(PAGE)
    socket.send_fds(bare, [OFFER.pack(5, PAGE)], [descriptor])
    os.close(descriptor)
    assert serve_until_answered(host, bare) == ANSWER.pack(5, True)
    request = ipc_fabric.make_request(1)

    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.set(zmq.LINGER, 0)
        stranger.connect(host.endpoint.local)
        stranger.send_multipart(encode_request(request, address=Address(9, host.endpoint.incarnation), place=place))
        ipc_fabric.wait_for_counter(host, host.receive, "num_malformed", 1)


@pytest.fixture
def pair(ipc_fabric):
    """A router and a host that know each other."""
    router, host = ipc_fabric.router(), ipc_fabric.host(max_queued_messages=5000)
    ipc_fabric.exchange(router, host, 1000)
    return router, host


def test_short_messages_go_through_the_door_once_a_host_has_answered(ipc_fabric, pair):
    router, host = pair
    assert (router.counters.num_near, host.counters.num_near) == (0, 0)
    for ticket in range(3):
        ipc_fabric.exchange(router, host, ticket)
    assert (router.counters.num_near, host.counters.num_near) == (3, 3)


def test_reply_that_is_too_long_for_the_door_comes_all_the_same(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1))
    (delivery,) = ipc_fabric.receive(host)
    longer = torch.randn(2, 1 << 16)
    host.reply(delivery, ipc_fabric.make_reply(delivery, longer))
    (reply,) = ipc_fabric.poll(router)
    assert torch.equal(reply.rows, longer)
    assert (router.counters.num_near, host.counters.num_near) == (1, 0)


def test_messages_that_find_no_room_in_the_door_arrive_all_the_same(ipc_fabric):
    host = ipc_fabric.host(max_queued_messages=5000)
    rows, num_messages = torch.ones(1, 4000), 1000
    with contextlib.closing(ZmqTransport(node="node-0", encryption="none")) as router:
        ipc_fabric.exchange(router, host, num_messages)
        for ticket in range(num_messages):
            router.send(host.endpoint, ipc_fabric.make_request(ticket, rows * ticket))
        assert 0 < router.counters.num_near < num_messages
        deliveries = ipc_fabric.receive(host, num_messages)
        for delivery in deliveries:
            host.reply(delivery, ipc_fabric.make_reply(delivery))
        assert 0 < host.counters.num_near < num_messages
        replies = {reply.ticket: reply.rows for reply in ipc_fabric.poll(router, num_messages)}
    assert all(torch.equal(replies[ticket], rows * ticket) for ticket in range(num_messages))


def test_request_through_the_door_for_another_incarnation_is_refused_and_counted(ipc_fabric, visitor):
    host, bare = visitor
    bare.send(ROUTE)
    address = Address(9, host.endpoint.incarnation ^ 1)
    bare.send(encode_request(ipc_fabric.make_request(1), address=address)[0])
    ipc_fabric.wait_for_counter(host, host.receive, "num_refused", 1)


def test_reply_to_a_router_that_left_the_door_is_discarded_and_counted(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1))
    (delivery,) = ipc_fabric.receive(host)
    router.close()
    deadline = time.monotonic() + ipc_fabric.deadline_s
    while not host.counters.num_discarded:
        assert time.monotonic() < deadline
        host.reply(delivery, ipc_fabric.make_reply(delivery))
        host.receive(0.001)
    ipc_fabric.exchange(ipc_fabric.router(), host, 2)


def test_host_that_shows_a_router_out_is_lost_with_what_it_was_sent_and_can_be_used_again(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    path = door_of(host)
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen()
        ipc_fabric.exchange(router, host, 1)
        visitor, _ = door.accept()
        with visitor:
            router.send(host.endpoint, ipc_fabric.make_request(2))
    assert router.counters.num_near == 1
    assert router.poll(ipc_fabric.deadline_s) == [HostLost(host.endpoint, "it hung up", is_death=False)]
    path.unlink()
    ipc_fabric.send_when_reached(router, host.endpoint, ipc_fabric.make_request(3), host=host)
    ipc_fabric.answer_next(router, host, 3)


def test_host_that_hangs_up_on_an_idle_router_is_still_reached(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    path = door_of(host)
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen()
        ipc_fabric.exchange(router, host, 1)
        door.accept()[0].close()
        assert router.poll(0.0) == []
        ipc_fabric.exchange(router, host, 2)
    assert router.counters.num_near == 0
