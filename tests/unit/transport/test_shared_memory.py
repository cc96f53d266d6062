"""Memory that routers and hosts of one node share: who owns which part of it, and until when."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import TransportError
from moe_runtime.transport.near_channel import ANSWER, OFFER, ROUTE_BYTES
from moe_runtime.transport.zmq_router import ZmqTransport

SHAPE = (64, 1024)
PAGE = 4096


def rows_of(value, shape=SHAPE):
    return torch.full(shape, float(value))


def num_mapped():
    """Segments that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:moe_runtime")


def exchange(fabric, router, host, ticket, rows):
    """A request whose rows come back plus 1."""
    router.send(host.endpoint, fabric.make_request(ticket, rows))
    (delivery,) = fabric.receive(host)
    host.reply(delivery, fabric.make_reply(delivery, delivery.request.rows + 1))
    (reply,) = fabric.poll(router)
    assert reply.ticket == ticket
    return reply.rows


@pytest.fixture
def pair(ipc_fabric):
    """A router and a host that share memory already."""
    router, host = ipc_fabric.router(), ipc_fabric.host()
    share(ipc_fabric, router, host)
    return router, host


def share(fabric, router, host):
    for ticket in range(10**6, 10**6 + 100):
        exchange(fabric, router, host, ticket, rows_of(0))
        if router.counters.num_shared:
            return
    pytest.fail(f"no memory was shared: {router.counters}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_rows_travel_in_shared_memory_both_ways(ipc_fabric, pair, dtype):
    router, host = pair
    before = router.counters.num_shared, host.counters.num_shared
    rows = torch.randn(SHAPE).to(dtype)
    assert torch.equal(exchange(ipc_fabric, router, host, 1, rows), rows + 1)
    assert (router.counters.num_shared, host.counters.num_shared) == (before[0] + 1, before[1] + 1)


def test_allocated_rows_are_neither_copied_on_the_way_there_nor_back(ipc_fabric, pair):
    router, host = pair
    rows = router.allocate(host.endpoint, SHAPE, torch.float32)
    address = rows.data_ptr()
    rows.copy_(rows_of(3))
    router.send(host.endpoint, ipc_fabric.make_request(1, rows))
    (delivery,) = ipc_fabric.receive(host)
    assert torch.equal(delivery.request.rows, rows_of(3))
    host.reply(delivery, ipc_fabric.make_reply(delivery))
    (reply,) = ipc_fabric.poll(router)
    assert reply.rows.data_ptr() == address
    assert torch.equal(reply.rows, rows_of(3))


def test_allocated_rows_can_be_sent_once(ipc_fabric, pair):
    router, host = pair
    rows = router.allocate(host.endpoint, SHAPE, torch.float32)
    router.send(host.endpoint, ipc_fabric.make_request(1, rows))
    with pytest.raises(TransportError, match="have been sent before"):
        router.send(host.endpoint, ipc_fabric.make_request(2, rows))


def test_allocated_rows_that_are_never_sent_are_free_again(ipc_fabric, pair):
    router, host = pair
    addresses = set()
    for _ in range(1000):
        addresses.add(router.allocate(host.endpoint, SHAPE, torch.float32).data_ptr())
    assert len(addresses) == 1


def test_reply_that_is_sent_on_is_not_overwritten(ipc_fabric, pair):
    router, host = pair
    first = exchange(ipc_fabric, router, host, 1, rows_of(1))
    second = exchange(ipc_fabric, router, host, 2, first)
    assert torch.equal(first, rows_of(2))
    assert torch.equal(second, rows_of(3))


def test_replies_that_are_kept_are_not_overwritten_by_later_ones(ipc_fabric):
    host = ipc_fabric.host()
    # Room for 8 of them.
    with contextlib.closing(ZmqTransport(node="node-0", max_shared_bytes=8 * rows_of(0).nbytes)) as router:
        share(ipc_fabric, router, host)
        kept = [exchange(ipc_fabric, router, host, ticket, rows_of(ticket)) for ticket in range(20)]
        assert all(torch.equal(rows, rows_of(ticket + 1)) for ticket, rows in enumerate(kept))
        assert router.counters.num_unshared >= 20 - 8
        del kept
        before = router.counters.num_shared
        exchange(ipc_fabric, router, host, 1000, rows_of(0))
        assert router.counters.num_shared == before + 1


def test_memory_of_an_unanswered_request_is_not_lent_again(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1, rows_of(1)))
    (slow,) = ipc_fabric.receive(host)
    for ticket in range(2, 50):
        assert torch.equal(exchange(ipc_fabric, router, host, ticket, rows_of(ticket)), rows_of(ticket + 1))
    assert torch.equal(slow.request.rows, rows_of(1))
    host.reply(slow, ipc_fabric.make_reply(slow))
    assert torch.equal(ipc_fabric.poll(router)[0].rows, rows_of(1))


def test_answer_from_before_a_connection_was_dropped_touches_nothing_of_the_next(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1, rows_of(1)))
    (old,) = ipc_fabric.receive(host)
    router.retain([])
    share(ipc_fabric, router, host)
    router.send(host.endpoint, ipc_fabric.make_request(2, rows_of(2)))
    (new,) = ipc_fabric.receive(host)
    host.reply(old, ipc_fabric.make_reply(old, rows_of(-1)))
    assert torch.equal(new.request.rows, rows_of(2))
    host.reply(new, ipc_fabric.make_reply(new))
    (reply,) = ipc_fabric.poll(router)
    assert reply.ticket == 2
    assert torch.equal(reply.rows, rows_of(2))


def test_second_reply_to_a_delivery_does_not_write_to_memory_that_was_given_back(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1, rows_of(1)))
    (delivery,) = ipc_fabric.receive(host)
    host.reply(delivery, ipc_fabric.make_reply(delivery, rows_of(5)))
    (first,) = ipc_fabric.poll(router)
    host.reply(delivery, ipc_fabric.make_reply(delivery, rows_of(6)))
    ipc_fabric.wait_for_counter(router, router.poll, "num_unexpected", 1)
    assert torch.equal(first.rows, rows_of(5))


def test_reply_larger_than_its_request_comes_as_frames(ipc_fabric, pair):
    router, host = pair
    router.send(host.endpoint, ipc_fabric.make_request(1, rows_of(1)))
    (delivery,) = ipc_fabric.receive(host)
    larger = rows_of(2, (64, 2048))
    host.reply(delivery, ipc_fabric.make_reply(delivery, larger))
    assert torch.equal(ipc_fabric.poll(router)[0].rows, larger)
    before = router.counters.num_unshared
    exchange(ipc_fabric, router, host, 2, rows_of(1))
    assert router.counters.num_unshared == before


def test_rows_travel_as_frames_where_no_memory_may_be_shared(ipc_fabric):
    host = ipc_fabric.host()
    with contextlib.closing(ZmqTransport(node="node-0", max_shared_bytes=0)) as router:
        for ticket in range(5):
            assert torch.equal(exchange(ipc_fabric, router, host, ticket, rows_of(ticket)), rows_of(ticket + 1))
        assert router.counters.num_shared == router.counters.num_unshared == 0


def test_rows_travel_as_frames_where_there_is_no_memory_left(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What the kernel grants to a segment is the size of a file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        for ticket in range(5):
            assert torch.equal(exchange(ipc_fabric, router, host, ticket, rows_of(ticket)), rows_of(ticket + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert router.counters.num_unshared == 5


def test_rows_travel_as_frames_to_a_host_that_has_closed_its_door(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    Path(host.endpoint.local.removeprefix("ipc://")).with_suffix(".shm").unlink()
    for ticket in range(3):
        assert torch.equal(exchange(ipc_fabric, router, host, ticket, rows_of(ticket)), rows_of(ticket + 1))
    assert router.counters.num_shared == 0


def test_memory_that_a_host_has_forgotten_is_not_used(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    path = Path(host.endpoint.local.removeprefix("ipc://")).with_suffix(".shm")
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen()
        exchange(ipc_fabric, router, host, 1, rows_of(1))
        visitor, _ = door.accept()
        with visitor:
            assert len(visitor.recv(100)) == ROUTE_BYTES
            offer, descriptors, _, _ = socket.recv_fds(visitor, OFFER.size, 1)
            os.close(descriptors[0])
            visitor.send(ANSWER.pack(OFFER.unpack(offer)[0], True))
        for ticket in range(2, 5):
            assert router.poll(0.0) == []
            assert torch.equal(exchange(ipc_fabric, router, host, ticket, rows_of(ticket)), rows_of(ticket + 1))
    assert router.counters.num_shared == 0


def test_memory_is_given_back_when_either_end_leaves(ipc_fabric):
    before = num_mapped()
    router, host = ipc_fabric.router(), ipc_fabric.host()
    share(ipc_fabric, router, host)
    assert num_mapped() >= before + 2
    kept = exchange(ipc_fabric, router, host, 1, rows_of(1))
    router.close()
    while num_mapped() > before + 1:
        assert host.receive(ipc_fabric.deadline_s) == []
    assert torch.equal(kept, rows_of(2))
    del kept
    assert num_mapped() == before
