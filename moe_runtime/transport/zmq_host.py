"""The expert host's end of the data plane: one ZeroMQ socket at an ipc and a tcp address, and a door beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import select
from typing import TYPE_CHECKING, NamedTuple

import zmq

from moe_runtime.errors import StartError, TransportError
from moe_runtime.service.ports import Delivery, Endpoint
from moe_runtime.transport.counters import TransportCounters
from moe_runtime.transport.curve import Doorkeeper, make_key_pair, secure_listener
from moe_runtime.transport.header import check_reply, decode_request, encode_reply
from moe_runtime.transport.header_fields import Address
from moe_runtime.transport.incarnation import mint_incarnation
from moe_runtime.transport.ipc_folder import default_ipc_folder, ipc_address, ipc_path, near_path, prepare_ipc_folder
from moe_runtime.transport.near_door import NearDoor, ReplySlot, Visitor
from moe_runtime.transport.waker import Waker
from moe_runtime.transport.zmq_socket import (
    DEFAULT_MAX_QUEUED_MESSAGES,
    DONTWAIT,
    MAX_MESSAGES_PER_CALL,
    MAX_WAIT_S,
    READABLE,
    bind,
    bind_tcp,
    open_socket,
    receive_one,
    send_now,
    sender_of,
    wait_for_any,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from moe_runtime.service.ports import HostReply
    from moe_runtime.transport.curve import Encryption
    from moe_runtime.transport.header import IncomingRequest


class _Lease(NamedTuple):
    """How a request came, and its reply goes.

    Attributes:
        address: Of the reply.
        route: How the socket knows the router.
        visitor: The router's own connection, if the request came through it.
        slot: Memory for the reply's rows, if there is any.
    """

    address: Address
    route: bytes
    visitor: Visitor | None
    slot: ReplySlot | None


class ZmqHostTransport:
    """Receives routers' requests and answers them; implements the port ``HostTransport``.

    Memory is bounded by the routers, each of which leaves at most its ``max_outstanding_bytes`` of rows unanswered
    here, and by ``max_queued_messages`` from and to each.

    Short messages of routers on this node, and to them, take a Unix socket of their own: through ZeroMQ each would
    cost two threads' wake-ups at either end.

    Requests that are malformed, or meant for another incarnation, are counted and dropped. The rows of a reply
    are sent from where they are: they must not be changed after ``reply``.
    """

    def __init__(
        self,
        *,
        node: str,
        ip: str | None = "127.0.0.1",
        port_range: tuple[int, int] | None = None,
        folder: Path | None = None,
        encryption: Encryption = "curve",
        max_queued_messages: int = DEFAULT_MAX_QUEUED_MESSAGES,
    ) -> None:
        """Listen at an ipc address for routers on this node, and at a tcp address for those on others.

        Args:
            node: Name of this node.
            ip: Address of this node that others reach; None listens for routers on this node only.
            port_range: Inclusive range of tcp ports to take the first free one from; any port when None.
            folder: Where the ipc socket lies; made with mode 700. ``default_ipc_folder()`` when None.
            encryption: ``curve`` lets only routers that were admitted connect from other nodes, and hides what
                they say; ``none`` lets everybody. The ipc socket is plain: its folder is private.
            max_queued_messages: Messages that wait for one router, or from one, before the queue is full.

        Raises:
            StartError: If the folder is not private to this user, its path is too long, or no port is free.
        """
        self.incarnation = mint_incarnation()
        folder = default_ipc_folder() if folder is None else folder
        prepare_ipc_folder(folder)
        self._ipc_path = ipc_path(folder, self.incarnation)
        self._epoll = select.epoll()
        self._near_door = NearDoor(near_path(self._ipc_path), epoll=self._epoll)
        self._counters = TransportCounters()
        self._closed = False
        self._waker = Waker()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context)
        self._socket = open_socket(self._context, zmq.ROUTER, max_queued=max_queued_messages)
        # Without it an answer to a router that is gone would vanish uncounted.
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._endpoint = self._listen(node, ip, port_range=port_range, encryption=encryption)
        self._send = sender_of(self._socket)
        self._only_socket = [(self._socket, READABLE)]
        # ZeroMQ's descriptors are signalled only after their socket was asked and had nothing.
        self._must_ask_socket = True
        self._on_ready: dict[int, Callable[[], None]] = {
            self._waker.fileno(): self._waker.drain,
            int(self._doorkeeper.socket.get(zmq.FD)): self._answer_the_door,
            int(self._socket.get(zmq.FD)): self._note_socket,
        }
        for descriptor in self._on_ready:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._answer_the_door()

    @property
    def endpoint(self) -> Endpoint:
        """Where routers find this host."""
        return self._endpoint

    @property
    def counters(self) -> TransportCounters:
        """A copy of the counters."""
        return dataclasses.replace(self._counters)

    def admit(self, public_keys: Collection[str]) -> None:
        """Let routers with these keys connect from other nodes, and no others. Thread-safe.

        Those on this node, and those that are connected already, need no key.

        Raises:
            TransportError: If a key is malformed.
        """
        self._doorkeeper.admit(public_keys)

    def receive(self, timeout_s: float) -> list[Delivery]:
        """Requests that have arrived; waits up to ``timeout_s`` for the first; returns early on ``wake``.

        May also return early with nothing, after a message that was counted and dropped.
        """
        if self._closed:
            return []
        deliveries: list[Delivery] = []
        if self._must_ask_socket:
            self._accept_waiting(deliveries)
        wait_s = 0.0 if deliveries else min(timeout_s, MAX_WAIT_S)
        while len(deliveries) < MAX_MESSAGES_PER_CALL:
            ready = self._epoll.poll(wait_s)
            if not ready:
                break
            for descriptor, _ in ready:
                on_ready = self._on_ready.get(descriptor)
                if on_ready is not None:
                    on_ready()
                else:
                    self._hear(descriptor, deliveries)
            if self._must_ask_socket:
                self._accept_waiting(deliveries)
            wait_s = 0.0
        return deliveries

    def reply(self, delivery: Delivery, reply: HostReply) -> None:
        """Answer a delivery without blocking; an answer to a router that is gone is discarded and counted.

        Raises:
            TransportError: If the reply is malformed or too large to travel.
        """
        if self._closed:
            self._counters.num_discarded += 1
            return
        if not isinstance(delivery.lease, _Lease):
            raise TransportError(f"reply {reply.ticket}: its request did not come through this transport")
        address, route, visitor, slot = delivery.lease
        is_placed = False
        if slot is not None and reply.rows is not None:
            check_reply(reply)
            is_placed = slot.fill(reply.rows)
        frames = encode_reply(reply, address=address, is_placed=is_placed)
        is_near = visitor is not None and len(frames) == 1 and visitor.try_send(frames[0])
        if not is_near:
            self._must_ask_socket = True
            try:
                send_now(self._send, [route, *frames])
            except zmq.ZMQError:
                # EHOSTUNREACH: the router is gone. EAGAIN: it does not drain its queue, and no one may wait for it.
                self._counters.num_discarded += 1
                return
        self._counters.num_sent += 1
        self._counters.num_near += is_near
        self._counters.num_shared += is_placed

    def wake(self) -> None:
        """Make a ``receive`` that is waiting, or the next one, return at once. Thread-safe."""
        self._waker.wake()

    def close(self) -> None:
        """Stop listening and remove the ipc socket; queued messages are discarded. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        self._doorkeeper.close()
        self._near_door.close()
        self._epoll.close()
        self._waker.close()
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            self._ipc_path.unlink()

    def _listen(
        self, node: str, ip: str | None, *, port_range: tuple[int, int] | None, encryption: Encryption
    ) -> Endpoint:
        local = ipc_address(self._ipc_path)
        remote = public_key = None
        try:
            bind(self._socket, local)
            if ip is not None:
                if encryption == "curve":
                    keys = make_key_pair()
                    public_key = keys.public
                    secure_listener(self._socket, keys)
                remote = bind_tcp(self._socket, ip, port_range)
        except StartError:
            self.close()
            raise
        return Endpoint(self.incarnation, node, local=local, remote=remote, public_key=public_key)

    def _answer_the_door(self) -> None:
        self._counters.num_strangers += self._doorkeeper.answer_waiting()

    def _note_socket(self) -> None:
        self._must_ask_socket = True

    def _accept_waiting(self, deliveries: list[Delivery]) -> None:
        """Take requests out of the socket."""
        for _ in range(MAX_MESSAGES_PER_CALL):
            if not wait_for_any(self._only_socket, 0.0):
                self._must_ask_socket = False
                return
            try:
                route = self._socket.recv(DONTWAIT)
            except zmq.Again:
                continue
            # It never comes alone.
            frames = receive_one(self._socket)
            incoming = None if frames is None else self._read(frames)
            if incoming is not None:
                self._deliver(incoming, deliveries, route=route)

    def _hear(self, descriptor: int, deliveries: list[Delivery]) -> None:
        """Take one request of a router on this node."""
        heard = self._near_door.hear(descriptor)
        if heard is None:
            return
        visitor, message = heard
        incoming = self._read((message,))
        if incoming is None:
            self._near_door.show_out(visitor)
        elif visitor.route is not None:
            self._deliver(incoming, deliveries, route=visitor.route, visitor=visitor)

    def _read(self, frames: Sequence[memoryview]) -> IncomingRequest | None:
        try:
            return decode_request(frames, find=self._near_door.find)
        except TransportError:
            self._counters.num_malformed += 1
            return None

    def _deliver(
        self, incoming: IncomingRequest, deliveries: list[Delivery], *, route: bytes, visitor: Visitor | None = None
    ) -> None:
        sender, receiver = incoming.address.sender, incoming.address.receiver
        if receiver != self.incarnation:
            self._counters.num_refused += 1
            return
        self._counters.num_received += 1
        memory = None if incoming.place is None else self._near_door.find(incoming.place)
        slot = None if memory is None else ReplySlot(memory)
        lease = _Lease(Address(receiver, sender), route, visitor, slot)
        deliveries.append(Delivery(route, incoming.request, lease))
