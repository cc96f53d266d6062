"""The router's end of the data plane: one ZeroMQ connection per incarnation of an expert host, and a door beside it."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import zmq

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostLost
from moe_runtime.transport.counters import TransportCounters
from moe_runtime.transport.curve import make_key_pair
from moe_runtime.transport.header import decode_reply, encode_request
from moe_runtime.transport.host_link import HostLink, LinkLimits
from moe_runtime.transport.incarnation import mint_incarnation
from moe_runtime.transport.link_monitor import LINK_FROZEN
from moe_runtime.transport.near_channel import MAX_PACKET_BYTES
from moe_runtime.transport.readiness import Readiness, SocketsToAsk
from moe_runtime.transport.waker import Waker
from moe_runtime.transport.zmq_socket import DEFAULT_MAX_QUEUED_MESSAGES, receive_waiting

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from moe_runtime.service.ports import Endpoint, HostReply, HostRequest
    from moe_runtime.transport.curve import Encryption
    from moe_runtime.transport.link_monitor import LinkLoss
    from moe_runtime.transport.near_channel import NearChannel

DEFAULT_MAX_OUTSTANDING_BYTES = 256 << 20
DEFAULT_MAX_SHARED_BYTES = 64 << 20
#: A host on this node that is found stopped twice in a row is lost.
_FREEZE_CHECK_S = 0.02


class ZmqTransport:
    """Sends requests to expert hosts and collects their replies; implements the port ``Transport``.

    Each endpoint gets a DEALER of its own with the first request, which connects once and is closed when the
    host is lost, so that nothing queued for a dead host can reach its successor at the same address; if it did,
    the successor would refuse it, since the message names the incarnation that it is meant for. A host that was lost
    is connected to again when there is something for it, and given nothing until it has answered the handshake: while
    it is cut off, requests are refused at once instead of waiting for it.

    Memory is bounded: each host holds at most ``max_outstanding_bytes`` of rows that it has not answered, or one
    request that is larger; beyond that, or beyond ``max_queued_messages``, ``send`` refuses. A slow host
    therefore costs its own requests, not those of the others.

    Short messages to and from a host on this node take a Unix socket of their own, once it has answered the first:
    through ZeroMQ each would cost two threads' wake-ups at either end. Large rows lie in memory that both share, up
    to ``max_shared_bytes`` of it; what finds no room there travels as frames, and is counted. A host on this node
    that is frozen is lost after some 40 ms, one that is cut off after a second, one that died at once.
    """

    def __init__(
        self,
        *,
        node: str,
        encryption: Encryption = "curve",
        max_queued_messages: int = DEFAULT_MAX_QUEUED_MESSAGES,
        max_outstanding_bytes: int = DEFAULT_MAX_OUTSTANDING_BYTES,
        max_shared_bytes: int = DEFAULT_MAX_SHARED_BYTES,
    ) -> None:
        """Open the router's end; connections come with the first request to each endpoint.

        Args:
            node: Name of this node; endpoints of the same node are reached by their local address.
            encryption: What the hosts of other nodes speak.
            max_queued_messages: Requests that wait for one host before ``send`` refuses more.
            max_outstanding_bytes: Rows that one host holds unanswered before ``send`` refuses more.
            max_shared_bytes: Memory shared with one host of this node; 0 shares none.
        """
        self.incarnation = mint_incarnation()
        self._node = node
        self._keys = make_key_pair() if encryption == "curve" else None
        self._limits = LinkLimits(max_queued_messages, max_outstanding_bytes, max_shared_bytes)
        self._counters = TransportCounters()
        self._links: dict[Endpoint, HostLink] = {}
        # By socket.
        self._link_of: dict[Any, HostLink] = {}
        self._to_ask = SocketsToAsk()
        # What the next poll returns, and the losses among it.
        self._arrived: list[HostReply | HostLost] = []
        self._losses: dict[Endpoint, str] = {}
        # Lost, told of, and not reached again since.
        self._doubted: set[Endpoint] = set()
        self._waker = Waker()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))
        self._readiness = Readiness()
        self._has_near = False
        self._packet = memoryview(bytearray(MAX_PACKET_BYTES))
        self._readiness.watch(self._waker.fileno(), self._take_wake)
        self._woken = False
        self._freezes_checked_at = 0.0
        self._closed = False

    @property
    def public_key(self) -> str | None:
        """Key that hosts of other nodes must admit; None without encryption."""
        return None if self._keys is None else self._keys.public

    @property
    def counters(self) -> TransportCounters:
        """A copy of the counters."""
        return dataclasses.replace(self._counters)

    def allocate(self, endpoint: Endpoint, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for the rows of one request to an endpoint, which ``send`` need not copy."""
        link = None if self._closed else self._links.get(endpoint)
        rows = None if link is None else link.allocate(shape, dtype)
        return torch.empty(shape, dtype=dtype) if rows is None else rows

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        """Hand a request to ZeroMQ without blocking.

        Raises:
            TransportError: If the endpoint cannot be reached from here or is lost, its queue is full, the
                request is malformed or too large, or the transport is closed.
        """
        if self._closed:
            raise TransportError(f"request {request.ticket}: the transport is closed")
        if self._losses and endpoint in self._losses:
            raise TransportError(f"request {request.ticket}: its host is lost: {self._losses[endpoint]}")
        link = self._links.get(endpoint) or self._connect(endpoint)
        if endpoint in self._doubted:
            self._expect_back(link, request)
        num_bytes = request.rows.nbytes
        if not link.has_credit(num_bytes):
            self._refuse(link, request)
        slot = link.place(request.rows)
        try:
            frames = encode_request(request, address=link.to_host, place=None if slot is None else slot.place)
            self._send_frames(link, frames, request)
        except TransportError:
            if slot is not None:
                slot.come_back()
            raise
        link.expect(request.ticket, num_bytes=num_bytes, slot=slot)
        self._counters.num_sent += 1
        if slot is not None:
            self._counters.num_shared += 1
        elif link.wants_to_share(num_bytes):
            self._counters.num_unshared += 1

    def poll(self, timeout_s: float) -> list[HostReply | HostLost]:
        """What has arrived, losses too; waits up to ``timeout_s`` for the first, and returns early on ``wake``."""
        if self._closed:
            return []
        give_up_at = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now - self._freezes_checked_at >= _FREEZE_CHECK_S:
                self._look_for_frozen_hosts(now)
            if self._to_ask:
                self._ask_sockets()
            remaining_s = 0.0 if self._arrived or self._to_ask else give_up_at - now
            if self._has_near and remaining_s > _FREEZE_CHECK_S:
                remaining_s = _FREEZE_CHECK_S
            self._readiness.wait(remaining_s)
            if self._woken or self._arrived or time.monotonic() >= give_up_at:
                break
        self._woken = False
        arrived, self._arrived = self._arrived, []
        self._losses.clear()
        return arrived

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Close the connections to all endpoints but these, with whatever is queued there; open none."""
        kept = frozenset(endpoints)
        for link in [*self._links.values()]:
            if link.endpoint not in kept:
                self._disconnect(link)
        self._doubted &= kept

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
        self._readiness.close()
        self._context.term()

    def _send_frames(self, link: HostLink, frames: list[Any], request: HostRequest) -> None:
        if link.try_send_near(frames):
            self._counters.num_near += 1
            return
        self._to_ask.add(link.socket)
        if not link.try_send(frames):
            self._refuse(link, request)

    def _refuse(self, link: HostLink, request: HostRequest) -> NoReturn:
        self._look_for_loss(link)
        reason = self._losses.get(link.endpoint)
        if reason is not None:
            raise TransportError(f"request {request.ticket}: its host is lost: {reason}")
        self._counters.num_full += 1
        raise TransportError(f"request {request.ticket}: the queue to {link.address} is full")

    def _expect_back(self, link: HostLink, request: HostRequest) -> None:
        if not link.is_up():
            raise TransportError(f"request {request.ticket}: its host was lost, and has not been reached again")
        self._doubted.discard(link.endpoint)

    def _connect(self, endpoint: Endpoint) -> HostLink:
        link = HostLink(
            endpoint, self._context, incarnation=self.incarnation, node=self._node, keys=self._keys, limits=self._limits
        )
        self._links[endpoint] = link
        self._link_of[link.socket] = link
        self._readiness.watch(int(link.socket.get(zmq.FD)), partial(self._to_ask.add, link.socket))
        self._readiness.watch(link.monitor.fileno(), partial(self._look_for_loss, link))
        if link.channel is not None:
            self._has_near = True
            self._readiness.watch(link.channel.fileno(), partial(self._read_channel, link, link.channel))
        return link

    def _disconnect(self, link: HostLink) -> None:
        del self._links[link.endpoint], self._link_of[link.socket]
        self._to_ask.discard(link.socket)
        self._readiness.unwatch(int(link.socket.get(zmq.FD)))
        self._readiness.unwatch(link.monitor.fileno())
        if link.channel is not None:
            self._readiness.unwatch(link.channel.fileno())
        self._has_near = any(other.channel is not None for other in self._links.values())
        link.close()

    def _ask_sockets(self) -> None:
        for socket, frames in self._to_ask.take():
            link = self._link_of.get(socket)
            if link is not None:
                link.note_known()
                self._accept(link, frames)

    def _take_wake(self) -> None:
        self._waker.drain()
        self._woken = True

    def _read_channel(self, link: HostLink, channel: NearChannel) -> None:
        """Take one message from a channel; most often there is one."""
        message = channel.read(self._packet)
        if message:
            self._accept(link, (message,))
        elif message is None:
            self._readiness.unwatch(channel.fileno())
            if link.hung_up():
                self._lose(link, link.end())

    def _look_for_frozen_hosts(self, now: float) -> None:
        self._freezes_checked_at = now
        for link in [*self._links.values()]:
            if link.is_frozen():
                self._lose(link, LINK_FROZEN)

    def _look_for_loss(self, link: HostLink) -> None:
        loss = link.loss()
        if loss is not None:
            self._lose(link, loss)

    def _lose(self, link: HostLink, loss: LinkLoss) -> None:
        """Close a link, after taking the replies that came before."""
        for frames in receive_waiting(link.socket):
            self._accept(link, frames)
        while link.channel is not None and (message := link.channel.read(self._packet)):
            self._accept(link, (message,))
        self._disconnect(link)
        if link.endpoint in self._doubted:
            return
        self._doubted.add(link.endpoint)
        self._losses[link.endpoint] = loss.reason
        self._arrived.append(HostLost(link.endpoint, loss.reason, loss.is_death))
        self._counters.num_lost += 1

    def _accept(self, link: HostLink, frames: Sequence[memoryview]) -> None:
        try:
            incoming = decode_reply(frames, find=link.find)
        except TransportError:
            self._counters.num_malformed += 1
            return
        if incoming.address != link.from_host:
            self._counters.num_refused += 1
        elif not (link.expects if incoming.reply.is_begun else link.take)(incoming.reply.ticket):
            self._counters.num_unexpected += 1
        else:
            self._counters.num_received += 1
            self._arrived.append(incoming.reply)
