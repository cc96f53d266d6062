"""The router's end of the data plane on ZeroMQ: one connection per incarnation of an expert host."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from moe_runtime.errors import TransportError
from moe_runtime.transport.counters import TransportCounters
from moe_runtime.transport.header import Address, decode_reply, encode_request
from moe_runtime.transport.incarnation import mint_incarnation
from moe_runtime.transport.tickets import OutstandingTickets
from moe_runtime.transport.waker import Waker
from moe_runtime.transport.zmq_socket import (
    DEFAULT_MAX_QUEUED_MESSAGES,
    open_socket,
    receive_waiting,
    wait_for_any,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from moe_runtime.service.ports import Endpoint, HostLost, HostReply, HostRequest


@dataclass(frozen=True)
class _Connection:
    endpoint: Endpoint
    socket: zmq.Socket[bytes]
    outstanding: OutstandingTickets = field(default_factory=OutstandingTickets)


class ZmqTransport:
    """Sends requests to expert hosts and collects their replies; implements the port ``Transport``.

    Each endpoint gets a DEALER of its own with the first request. ZeroMQ connects it again by itself, and may
    then hand what was queued for a dead host to its successor at the same address: the successor refuses it,
    since the message names the incarnation that it is meant for.

    A host's death is not noticed: ``poll`` gives replies only, and the caller's timeouts tell the rest.

    The rows of a request are sent from where they are: they must not be changed after ``send``.
    """

    def __init__(self, *, node: str, max_queued_messages: int = DEFAULT_MAX_QUEUED_MESSAGES) -> None:
        """Open the router's end; connections come with the first request to each endpoint.

        Args:
            node: Name of this node; endpoints of the same node are reached by their local address.
            max_queued_messages: Requests that wait for one host before ``send`` refuses more.
        """
        self.incarnation = mint_incarnation()
        self._node = node
        self._max_queued = max_queued_messages
        self._counters = TransportCounters()
        self._connections: dict[Endpoint, _Connection] = {}
        self._by_socket: dict[zmq.Socket[bytes], _Connection] = {}
        self._waker = Waker()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self._closed = False

    @property
    def counters(self) -> TransportCounters:
        """A copy of the counters."""
        return dataclasses.replace(self._counters)

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        """Hand a request to ZeroMQ without blocking.

        Raises:
            TransportError: If the endpoint cannot be reached from here, its queue is full, the request is
                malformed or too large, or the transport is closed.
        """
        if self._closed:
            raise TransportError(f"request {request.ticket}: the transport is closed")
        frames = encode_request(request, address=Address(self.incarnation, endpoint.incarnation))
        connection = self._connections.get(endpoint) or self._connect(endpoint)
        try:
            connection.socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again as exc:
            self._counters.num_full += 1
            raise TransportError(
                f"request {request.ticket}: the queue to {self._address_of(endpoint)} is full"
            ) from exc
        connection.outstanding.add(request.ticket)
        self._counters.num_sent += 1

    def poll(self, timeout_s: float) -> list[HostReply | HostLost]:
        """Replies that have arrived; waits up to ``timeout_s`` for the first, and returns early on ``wake``.

        May also return early with nothing, after a message that was counted and dropped.
        """
        if self._closed:
            return []
        replies: list[HostReply | HostLost] = []
        for ready in wait_for_any(self._poller, timeout_s):
            if ready == self._waker.fileno():
                self._waker.drain()
                continue
            connection = self._by_socket[ready]
            for frames in receive_waiting(connection.socket):
                reply = self._accept(connection, frames)
                if reply is not None:
                    replies.append(reply)
        return replies

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Close the connections to all endpoints but these, with whatever is queued there; open none."""
        kept = frozenset(endpoints)
        for connection in [*self._connections.values()]:
            if connection.endpoint not in kept:
                self._disconnect(connection)

    def wake(self) -> None:
        """Make a ``poll`` that is waiting, or the next one, return at once. Thread-safe."""
        self._waker.wake()

    def close(self) -> None:
        """Close every connection; queued messages are discarded. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.retain(())
        self._waker.close()
        self._context.term()

    def _address_of(self, endpoint: Endpoint) -> str:
        is_near = endpoint.node == self._node and endpoint.local is not None
        address = endpoint.local if is_near else endpoint.remote
        if address is None:
            raise TransportError(
                f"endpoint {endpoint.incarnation:016x} on node {endpoint.node} cannot be reached from node "
                f"{self._node}: it has no address for other nodes"
            )
        return address

    def _connect(self, endpoint: Endpoint) -> _Connection:
        address = self._address_of(endpoint)
        socket = open_socket(self._context, zmq.DEALER, max_queued=self._max_queued)
        try:
            socket.connect(address)
        except zmq.ZMQError as exc:
            socket.close()
            raise TransportError(f"endpoint {address}: cannot connect: {exc}") from exc
        connection = _Connection(endpoint, socket)
        self._connections[endpoint] = connection
        self._by_socket[socket] = connection
        self._poller.register(socket, zmq.POLLIN)
        return connection

    def _disconnect(self, connection: _Connection) -> None:
        del self._connections[connection.endpoint]
        del self._by_socket[connection.socket]
        self._poller.unregister(connection.socket)
        connection.socket.close()

    def _accept(self, connection: _Connection, frames: list[memoryview]) -> HostReply | None:
        try:
            incoming = decode_reply(frames)
        except TransportError:
            self._counters.num_malformed += 1
            return None
        if incoming.address != Address(connection.endpoint.incarnation, self.incarnation):
            self._counters.num_refused += 1
            return None
        if not connection.outstanding.take(incoming.reply.ticket):
            self._counters.num_unexpected += 1
            return None
        self._counters.num_received += 1
        return incoming.reply
