"""Routers and expert hosts in the threads of one process: the same ports without a socket."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import torch

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import Delivery, Endpoint, HostLost
from moe_runtime.transport.counters import TransportCounters
from moe_runtime.transport.header import check_reply, check_request
from moe_runtime.transport.incarnation import INCARNATION_BITS, mint_incarnation
from moe_runtime.transport.tickets import OutstandingTickets

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from moe_runtime.service.ports import HostReply, HostRequest

ItemT = TypeVar("ItemT")
DEFAULT_MAX_QUEUED_MESSAGES = 1000


class _Mailbox(Generic[ItemT]):
    """A queue that one thread empties at once and any thread fills, bounded where asked."""

    def __init__(self) -> None:
        self._items: deque[ItemT] = deque()
        self._changed = threading.Condition()
        self._woken = False
        self._closed = False

    def put(self, item: ItemT, *, max_items: int | None = None) -> bool:
        """Whether the item was taken: not when the mailbox is closed or full."""
        with self._changed:
            if self._closed or (max_items is not None and len(self._items) >= max_items):
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def take_all(self, timeout_s: float) -> list[ItemT]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._items or self._woken or self._closed,
                timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX),
            )
            self._woken = False
            items = [*self._items]
            self._items.clear()
            return items

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> bool:
        """Whether this call closed it; what it holds is discarded."""
        with self._changed:
            was_open, self._closed = not self._closed, True
            self._items.clear()
            self._changed.notify()
            return was_open


@dataclass(frozen=True)
class _Reply:
    """A host's reply on its way to a router."""

    endpoint: Endpoint
    reply: HostReply


class InProcessNetwork:
    """Joins routers and hosts of one process.

    Unlike sockets it tells at once that a host is gone: ``send`` to a closed host raises, and routers that
    were connected to it get ``HostLost``. Rows are handed over as they are, not copied.
    """

    def __init__(self, *, max_queued_messages: int = DEFAULT_MAX_QUEUED_MESSAGES) -> None:
        """Make a network without members.

        Args:
            max_queued_messages: Requests that wait at one host before ``send`` refuses more.
        """
        self.max_queued_messages = max_queued_messages
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._hosts: dict[str, InProcessHostTransport] = {}
        self._routers: dict[int, InProcessTransport] = {}

    def router_transport(self) -> InProcessTransport:
        """A router's end."""
        router = InProcessTransport(self)
        with self._lock:
            self._routers[router.incarnation] = router
        return router

    def host_transport(self, *, node: str = "local", address: str | None = None) -> InProcessHostTransport:
        """An expert host's end, at an address that it shares with no living host.

        Raises:
            TransportError: If a living host has the address.
        """
        with self._lock:
            address = f"in-process://{next(self._numbers)}" if address is None else address
            if address in self._hosts:
                raise TransportError(f"address {address}: a host is listening there already")
            host = InProcessHostTransport(self, Endpoint(mint_incarnation(), node, local=address))
            self._hosts[address] = host
            return host

    def host_at(self, endpoint: Endpoint) -> InProcessHostTransport | None:
        """The living host at an endpoint's address, whatever its incarnation."""
        with self._lock:
            return None if endpoint.local is None else self._hosts.get(endpoint.local)

    def router_of(self, incarnation: int) -> InProcessTransport | None:
        """The living router of an incarnation."""
        with self._lock:
            return self._routers.get(incarnation)

    def remove_router(self, incarnation: int) -> None:
        """Forget a router that closed."""
        with self._lock:
            del self._routers[incarnation]

    def remove_host(self, endpoint: Endpoint) -> None:
        """Forget a host that closed, and tell the routers."""
        with self._lock:
            del self._hosts[str(endpoint.local)]
            routers = [*self._routers.values()]
        for router in routers:
            router.inbox.put(HostLost(endpoint, "its host closed"))


class InProcessTransport:
    """A router's end of an ``InProcessNetwork``; implements the port ``Transport``."""

    def __init__(self, network: InProcessNetwork) -> None:
        self.incarnation = mint_incarnation()
        self.inbox: _Mailbox[_Reply | HostLost] = _Mailbox()
        self._network = network
        self._counters = TransportCounters()
        self._connections: dict[Endpoint, OutstandingTickets] = {}
        self._closed = False

    @property
    def public_key(self) -> None:
        """None: a process needs no keys to talk to itself."""
        return

    @property
    def counters(self) -> TransportCounters:
        """A copy of the counters."""
        return dataclasses.replace(self._counters)

    def allocate(self, endpoint: Endpoint, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Ordinary memory: rows are handed over as they are, wherever they lie."""
        del endpoint
        return torch.empty(shape, dtype=dtype)

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        """Put a request into its host's queue.

        Raises:
            TransportError: If no host is there, its queue is full, the request is malformed, or the transport
                is closed.
        """
        if self._closed:
            raise TransportError(f"request {request.ticket}: the transport is closed")
        check_request(request)
        host = self._network.host_at(endpoint)
        if host is None:
            raise TransportError(f"request {request.ticket}: no host listens at {endpoint.local}")
        # Before it is delivered: the reply may be there before `deliver` returns.
        outstanding = self._connections.setdefault(endpoint, OutstandingTickets())
        outstanding.add(request.ticket)
        if not host.deliver(endpoint.incarnation, Delivery(_sender(self.incarnation), request)):
            outstanding.take(request.ticket)
            self._counters.num_full += 1
            raise TransportError(f"request {request.ticket}: the queue to {endpoint.local} is full, or closed")
        self._counters.num_sent += 1

    def poll(self, timeout_s: float) -> list[HostReply | HostLost]:
        """Whatever has arrived; waits up to ``timeout_s`` for the first, and returns early on ``wake``."""
        accepted = (self._accept(message) for message in self.inbox.take_all(timeout_s))
        return [message for message in accepted if message is not None]

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Forget the tickets of all endpoints but these."""
        kept = frozenset(endpoints)
        for endpoint in [*self._connections]:
            if endpoint not in kept:
                del self._connections[endpoint]

    def wake(self) -> None:
        """Make a ``poll`` that is waiting, or the next one, return at once. Thread-safe."""
        self.inbox.wake()

    def close(self) -> None:
        """Leave the network; queued messages are discarded. Safe to call twice."""
        if self.inbox.close():
            self._closed = True
            self._connections.clear()
            self._network.remove_router(self.incarnation)

    def _accept(self, message: _Reply | HostLost) -> HostReply | HostLost | None:
        if isinstance(message, HostLost):
            return message if self._connections.pop(message.endpoint, None) is not None else None
        outstanding = self._connections.get(message.endpoint)
        ticket = message.reply.ticket
        is_known = outstanding is not None and ticket in outstanding
        if outstanding is None or not is_known:
            self._counters.num_unexpected += 1
            return None
        if not message.reply.is_begun:
            outstanding.take(ticket)
        self._counters.num_received += 1
        return message.reply


class InProcessHostTransport:
    """An expert host's end of an ``InProcessNetwork``; implements the port ``HostTransport``."""

    def __init__(self, network: InProcessNetwork, endpoint: Endpoint) -> None:
        self._network = network
        self._endpoint = endpoint
        self._inbox: _Mailbox[Delivery] = _Mailbox()
        self._counters = TransportCounters()
        self._counting = threading.Lock()

    @property
    def endpoint(self) -> Endpoint:
        """Where routers find this host."""
        return self._endpoint

    @property
    def counters(self) -> TransportCounters:
        """A copy of the counters."""
        return dataclasses.replace(self._counters)

    def deliver(self, incarnation: int, delivery: Delivery) -> bool:
        """Whether there was room for a request; one for another incarnation is counted and dropped."""
        if incarnation != self._endpoint.incarnation:
            with self._counting:
                self._counters.num_refused += 1
            return True
        return self._inbox.put(delivery, max_items=self._network.max_queued_messages)

    def admit(self, public_keys: Collection[str]) -> None:
        """Does nothing: whoever is in the process is admitted."""

    def receive(self, timeout_s: float) -> list[Delivery]:
        """All requests that have arrived; waits up to ``timeout_s`` for the first; returns early on ``wake``."""
        deliveries = self._inbox.take_all(timeout_s)
        self._counters.num_received += len(deliveries)
        return deliveries

    def reply(self, delivery: Delivery, reply: HostReply) -> None:
        """Answer a delivery; an answer to a router that is gone is discarded and counted.

        Raises:
            TransportError: If the reply is malformed.
        """
        check_reply(reply)
        if reply.rows is not None and reply.rows.is_inference():
            # Autograd refuses tensors that were made in inference mode; those from a socket are ordinary.
            reply = msgspec.structs.replace(reply, rows=reply.rows.clone())
        router = self._network.router_of(int.from_bytes(delivery.sender, "big"))
        if router is not None and router.inbox.put(_Reply(self._endpoint, reply)):
            self._counters.num_sent += 1
        else:
            self._counters.num_discarded += 1

    def wake(self) -> None:
        """Make a ``receive`` that is waiting, or the next one, return at once. Thread-safe."""
        self._inbox.wake()

    def close(self) -> None:
        """Leave the network and tell the routers; queued messages are discarded. Safe to call twice."""
        if self._inbox.close():
            self._network.remove_host(self._endpoint)


def _sender(incarnation: int) -> bytes:
    return incarnation.to_bytes(INCARNATION_BITS // 8, "big")
