import select

import pytest
import torch

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostLost, HostRequest, Segment
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.transport.incarnation import mint_incarnation
from moe_runtime.transport.tickets import OutstandingTickets
from moe_runtime.transport.waker import Waker


def readable(waker):
    return bool(select.select([waker.fileno()], [], [], 0)[0])


def test_incarnations_differ_and_fit_64_bits():
    minted = {mint_incarnation() for _ in range(1000)}
    assert len(minted) == 1000
    assert all(0 < incarnation < 2**64 for incarnation in minted)


def test_ticket_is_taken_once():
    tickets = OutstandingTickets()
    tickets.add(1)
    assert tickets.take(1)
    assert not tickets.take(1)
    assert not tickets.take(2)


def test_oldest_ticket_is_forgotten_when_too_many_are_outstanding():
    tickets = OutstandingTickets(max_outstanding=2)
    for ticket in (1, 2, 3):
        tickets.add(ticket)
    assert len(tickets) == 2
    assert [tickets.take(ticket) for ticket in (1, 2, 3)] == [False, True, True]


def test_any_number_of_wake_ups_is_drained_at_once_and_never_blocks():
    waker = Waker()
    assert not readable(waker)
    for _ in range(100_000):
        waker.wake()
    assert readable(waker)
    waker.drain()
    assert not readable(waker)
    waker.close()
    waker.close()
    waker.wake()


def test_closed_in_process_host_is_lost_to_the_routers_that_used_it():
    network = InProcessNetwork()
    user, bystander = network.router_transport(), network.router_transport()
    host = network.host_transport()
    request = HostRequest(1, (Segment("a", 1),), torch.ones(1, 1), 1.0)
    user.send(host.endpoint, request)
    host.close()
    assert user.poll(5.0) == [HostLost(host.endpoint, "its host closed")]
    assert bystander.poll(0.0) == []
    with pytest.raises(TransportError, match="no host listens at in-process://0"):
        user.send(host.endpoint, request)


def test_in_process_address_is_one_host_s_at_a_time():
    network = InProcessNetwork()
    host = network.host_transport()
    with pytest.raises(TransportError, match="a host is listening there already"):
        network.host_transport(address=host.endpoint.local)
