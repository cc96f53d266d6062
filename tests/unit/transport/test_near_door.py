"""Visitors at a host's door who are no routers of this runtime."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import zmq

from moe_runtime.transport.header import encode_request
from moe_runtime.transport.header_fields import Address, Place
from moe_runtime.transport.near_channel import ANSWER, OFFER
from moe_runtime.transport.shared_memory import create_segment

PAGE = 4096


@pytest.fixture
def visitor(ipc_fabric):
    """A host, and a bare socket that has come through its door."""
    host = ipc_fabric.host()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bare:
        bare.settimeout(ipc_fabric.deadline_s)
        bare.connect(str(Path(host.endpoint.local.removeprefix("ipc://")).with_suffix(".shm")))
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


@pytest.mark.parametrize("offer", [b"", b"x", OFFER.pack(1, PAGE), b"x" * 1000])
def test_visitor_who_offers_no_memory_is_shown_out(visitor, offer):
    host, bare = visitor
    bare.send(offer)
    assert serve_until_answered(host, bare) == b""


def test_visitor_who_offers_memory_that_could_shrink_is_told_that_it_is_no_use(visitor):
    host, bare = visitor
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    socket.send_fds(bare, [OFFER.pack(1, PAGE)], [descriptor])
    os.close(descriptor)
    assert serve_until_answered(host, bare) == ANSWER.pack(1, False)


@pytest.mark.parametrize("place", [Place(99, 0, PAGE), Place(5, PAGE, PAGE), Place(5, 1, PAGE), Place(5, 0, 8)])
def test_request_that_names_memory_which_is_not_there_is_counted_as_malformed(ipc_fabric, visitor, place):
    host, bare = visitor
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
