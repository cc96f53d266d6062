"""Hosts and routers in processes of their own that are really frozen and killed, in the middle of things too."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch

from fakes.host_process import (
    ChildProcess,
    abort,
    answer_hugely,
    answer_when_told,
    ask_hugely,
    echo,
    exit_at_once,
)
from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostLost, HostReply

LARGE_ROWS = torch.ones(256, 1024)


@pytest.fixture
def start():
    """Starts processes that run a function with the options of a fabric; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start_one(run, fabric, *routers):
            keys = [router.public_key for router in routers if router.public_key is not None]
            options = {"node": "node-0", "folder": fabric.folder, "encryption": fabric.encryption, "admitted": keys}
            return stack.enter_context(contextlib.closing(ChildProcess(run, **options)))

        yield start_one


def wait_for_loss(router, deadline_s=20.0):
    """The next loss that a router hears of, and everything that came before it."""
    events = []
    deadline = time.monotonic() + deadline_s
    while not any(isinstance(event, HostLost) for event in events):
        assert time.monotonic() < deadline, "no host was lost"
        events += router.poll(deadline_s)
    return events


def link_of(descriptor):
    """What a descriptor of this process refers to; nothing if it was closed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(descriptor.path)
    return ""


def call(fabric, router, endpoint, ticket, rows=None):
    """The rows that a host answers with."""
    router.send(endpoint, fabric.make_request(ticket, rows))
    (reply,) = fabric.poll(router)
    assert reply.ticket == ticket
    return reply.rows


def test_killed_host_is_lost_in_under_100_ms(zmq_fabric, start):
    router = zmq_fabric.router()
    times_s = []
    for ticket in range(3):
        process = start(echo, zmq_fabric, router)
        endpoint = process.expect()
        call(zmq_fabric, router, endpoint, ticket)
        killed_at = time.monotonic()
        process.kill()
        (lost,) = wait_for_loss(router)
        times_s.append(time.monotonic() - killed_at)
        assert lost == HostLost(endpoint, "its process ended", is_death=True)
    # The best of three: a busy machine may schedule this test late.
    assert min(times_s) < 0.1
    assert router.counters.num_lost == 3


def test_frozen_host_of_this_node_is_lost_in_under_100_ms(ipc_fabric, start):
    router = ipc_fabric.router()
    times_s = []
    for ticket in range(3):
        process = start(echo, ipc_fabric, router)
        endpoint = process.expect()
        call(ipc_fabric, router, endpoint, ticket)
        frozen_at = time.monotonic()
        process.freeze()
        assert wait_for_loss(router) == [HostLost(endpoint, "its process is frozen", is_death=False)]
        times_s.append(time.monotonic() - frozen_at)
    assert min(times_s) < 0.1


def test_frozen_host_of_another_node_is_lost_by_its_silence(tcp_fabric, start):
    router = tcp_fabric.router()
    process = start(echo, tcp_fabric, router)
    endpoint = process.expect()
    call(tcp_fabric, router, endpoint, 1)
    process.freeze()
    reason = "it was silent for too long: its process froze, or was cut off"
    assert wait_for_loss(router) == [HostLost(endpoint, reason, is_death=False)]


def test_host_of_another_node_that_is_killed_while_it_is_frozen_is_lost_by_its_death(tcp_fabric, start):
    router = tcp_fabric.router()
    process = start(echo, tcp_fabric, router)
    endpoint = process.expect()
    call(tcp_fabric, router, endpoint, 1)
    process.freeze()
    process.kill()
    assert wait_for_loss(router) == [HostLost(endpoint, "its process ended", is_death=True)]


@pytest.mark.parametrize("stop", [exit_at_once, abort])
def test_host_whose_process_ends_itself_is_lost_by_its_death(zmq_fabric, start, stop):
    router = zmq_fabric.router()
    process = start(stop, zmq_fabric, router)
    endpoint = process.expect()
    router.send(endpoint, zmq_fabric.make_request(1))
    assert wait_for_loss(router) == [HostLost(endpoint, "its process ended", is_death=True)]


def test_host_of_this_node_that_closes_and_lives_on_has_not_died(ipc_fabric):
    router, host = ipc_fabric.router(), ipc_fabric.host()
    ipc_fabric.exchange(router, host, 1)
    host.close()
    assert wait_for_loss(router) == [HostLost(host.endpoint, "it hung up", is_death=False)]


def test_host_of_another_node_that_closes_cannot_be_told_from_one_that_died(tcp_fabric):
    router, host = tcp_fabric.router(), tcp_fabric.host()
    tcp_fabric.exchange(router, host, 1)
    host.close()
    assert wait_for_loss(router) == [HostLost(host.endpoint, "its process ended", is_death=True)]


def test_no_socket_is_left_of_hosts_that_were_lost(zmq_fabric, start):
    router = zmq_fabric.router()

    def num_sockets_after_a_loss(ticket):
        process = start(echo, zmq_fabric, router)
        call(zmq_fabric, router, process.expect(), ticket)
        process.kill()
        wait_for_loss(router)
        process.close()
        with os.scandir("/proc/self/fd") as descriptors:
            return sum(link.startswith("socket:") for link in map(link_of, descriptors))

    first = num_sockets_after_a_loss(1)
    # ZeroMQ closes its end in a thread of its own.
    deadline = time.monotonic() + zmq_fabric.deadline_s
    while num_sockets_after_a_loss(2) > first:
        assert time.monotonic() < deadline


def test_late_answer_of_a_host_that_was_frozen_is_ignored_and_it_can_be_used_again(zmq_fabric, start):
    router = zmq_fabric.router()
    process = start(answer_when_told, zmq_fabric, router)
    endpoint = process.expect()
    router.send(endpoint, zmq_fabric.make_request(1, LARGE_ROWS))
    assert process.expect() == "received"
    process.freeze()
    assert [event.endpoint for event in wait_for_loss(router)] == [endpoint]
    process.thaw()
    process.pipe.send("answer")
    assert process.expect() == "answered"
    zmq_fabric.send_when_reached(router, endpoint, zmq_fabric.make_request(2))
    assert process.expect() == "received"
    process.pipe.send("answer")
    assert [reply.ticket for reply in zmq_fabric.poll(router)] == [2]
    assert router.poll(0.0) == []


def test_lost_host_is_given_nothing_and_lost_only_once_for_as_long_as_it_is_silent(zmq_fabric, start):
    router = zmq_fabric.router()
    process = start(echo, zmq_fabric, router)
    endpoint = process.expect()
    call(zmq_fabric, router, endpoint, 1)
    process.freeze()
    wait_for_loss(router)
    for ticket in range(2, 7):
        with pytest.raises(TransportError, match="its host was lost, and has not been reached again"):
            router.send(endpoint, zmq_fabric.make_request(ticket))
        assert router.poll(0.05) == []
    process.thaw()
    zmq_fabric.send_when_reached(router, endpoint, zmq_fabric.make_request(7))
    assert [reply.ticket for reply in zmq_fabric.poll(router)] == [7]
    assert router.counters.num_lost == 1


def test_busy_host_is_not_lost(zmq_fabric, start):
    router = zmq_fabric.router()
    process = start(answer_when_told, zmq_fabric, router)
    endpoint = process.expect()
    router.send(endpoint, zmq_fabric.make_request(1))
    assert process.expect() == "received"
    # Its Python is not running; heartbeats would have been missed twice.
    assert router.poll(2.5) == []
    process.pipe.send("answer")
    assert [reply.ticket for reply in zmq_fabric.poll(router)] == [1]


def test_host_that_was_never_there_is_lost(zmq_fabric, start):
    router = zmq_fabric.router()
    process = start(echo, zmq_fabric, router)
    endpoint = process.expect()
    process.close()
    router.send(endpoint, zmq_fabric.make_request(1))
    assert wait_for_loss(router) == [HostLost(endpoint, "nobody listens at its address", is_death=False)]


def test_nothing_is_sent_to_a_lost_host_before_its_loss_was_reported(zmq_fabric, start):
    router = zmq_fabric.router()
    process = start(echo, zmq_fabric, router)
    endpoint = process.expect()
    call(zmq_fabric, router, endpoint, 1)
    process.close()
    deadline = time.monotonic() + zmq_fabric.deadline_s
    while router.counters.num_lost == 0:
        assert time.monotonic() < deadline
        # It looks for the reason when the queue is full.
        with contextlib.suppress(TransportError):
            router.send(endpoint, zmq_fabric.make_request(2, torch.ones(1, 1 << 18)))
    with pytest.raises(TransportError, match="its host is lost: its process ended"):
        router.send(endpoint, zmq_fabric.make_request(3))
    assert isinstance(router.poll(0.0)[-1], HostLost)


def test_host_killed_in_the_middle_of_its_answer_is_lost_and_others_go_on(zmq_fabric, start):
    router = zmq_fabric.router()
    hosts = [start(run, zmq_fabric, router) for run in (answer_hugely, echo)]
    dying, living = [host.expect() for host in hosts]
    router.send(dying, zmq_fabric.make_request(1, torch.ones(1, 1)))
    assert hosts[0].expect() == "answered"
    hosts[0].kill()
    assert [event.endpoint for event in wait_for_loss(router)] == [dying]
    assert torch.equal(call(zmq_fabric, router, living, 2), torch.full((2, 3), 2.0))


def test_router_killed_in_the_middle_of_its_request_harms_nobody(tcp_fabric):
    host, router = tcp_fabric.host(), tcp_fabric.router()
    with contextlib.closing(ChildProcess(ask_hugely, host.endpoint, node="node-1")) as process:
        assert process.expect() == "sent"
    tcp_fabric.exchange(router, host, 2)
    assert host.counters.num_received == 1


def test_host_killed_while_it_holds_shared_memory_harms_nobody(ipc_fabric, start):
    router = ipc_fabric.router()
    hosts = [start(run, ipc_fabric, router) for run in (answer_when_told, echo)]
    dying, living = [host.expect() for host in hosts]
    for ticket in (1, 2):
        # The second finds the memory that the first asked for.
        router.send(dying, ipc_fabric.make_request(ticket, LARGE_ROWS))
        assert hosts[0].expect() == "received"
        if ticket == 1:
            hosts[0].pipe.send("answer")
            assert hosts[0].expect() == "answered"
            kept = ipc_fabric.poll(router)[0].rows
    hosts[0].kill()
    assert [event.endpoint for event in wait_for_loss(router)] == [dying]
    assert torch.equal(kept, LARGE_ROWS + 1)
    assert torch.equal(call(ipc_fabric, router, living, 3, LARGE_ROWS), LARGE_ROWS + 1)


def test_two_routers_and_four_hosts_at_once_while_one_host_dies(zmq_fabric, start):
    routers = [zmq_fabric.router() for _ in range(2)]
    processes = [start(echo, zmq_fabric, *routers) for _ in range(4)]
    endpoints = [process.expect() for process in processes]
    expected = {}
    for index, router in enumerate(routers):
        for number, endpoint in enumerate(endpoints):
            for rows in (torch.full((1, 8), float(number)), torch.full((64, 1024), float(number))):
                ticket = len(expected)
                expected[ticket] = (index, number, rows + 1)
                router.send(endpoint, zmq_fabric.make_request(ticket, rows))
    processes[0].kill()
    for index, router in enumerate(routers):
        answered = collect_until_settled(router, {t for t, (i, n, _) in expected.items() if i == index and n > 0})
        for ticket, rows in answered.items():
            assert expected[ticket][0] == index
            assert torch.equal(rows, expected[ticket][2])


def collect_until_settled(router, tickets, deadline_s=20.0):
    """Replies by ticket, once those to some tickets and one loss have come."""
    replies, lost = {}, []
    deadline = time.monotonic() + deadline_s
    while not (tickets <= replies.keys() and lost):
        assert time.monotonic() < deadline, f"missing: {tickets - replies.keys()}, lost: {lost}"
        for event in router.poll(deadline_s):
            if isinstance(event, HostReply):
                replies[event.ticket] = event.rows
            else:
                lost.append(event.endpoint)
    assert len(lost) == 1
    return replies


def test_message_queued_for_a_frozen_predecessor_reaches_nobody(tcp_fabric, start):
    router = tcp_fabric.router()
    process = start(echo, tcp_fabric, router)
    dead = process.expect()
    call(tcp_fabric, router, dead, 1)
    process.freeze()
    with contextlib.suppress(TransportError):
        for ticket in range(100, 200):
            router.send(dead, tcp_fabric.make_request(ticket, torch.ones(1, 1 << 20)))
    process.close()
    successor = tcp_fabric.successor(dead)
    (lost,) = wait_for_loss(router)
    assert lost.endpoint == dead
    tcp_fabric.exchange(router, successor, 2)
    assert successor.counters.num_received == 1
