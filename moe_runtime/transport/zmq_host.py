"""The expert host's end of the data plane on ZeroMQ: one socket at an ipc and a tcp address."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import zmq

from moe_runtime.errors import StartError, TransportError
from moe_runtime.service.ports import Delivery, Endpoint
from moe_runtime.transport.counters import TransportCounters
from moe_runtime.transport.curve import Doorkeeper, make_key_pair, secure_listener
from moe_runtime.transport.header import check_reply, decode_request, encode_reply
from moe_runtime.transport.header_fields import Address
from moe_runtime.transport.incarnation import INCARNATION_BITS, mint_incarnation
from moe_runtime.transport.ipc_folder import default_ipc_folder, ipc_address, ipc_path, near_path, prepare_ipc_folder
from moe_runtime.transport.near_door import NearDoor, ReplySlot
from moe_runtime.transport.waker import Waker
from moe_runtime.transport.zmq_socket import (
    DEFAULT_MAX_QUEUED_MESSAGES,
    DONTWAIT,
    MAX_MESSAGES_PER_CALL,
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
    from collections.abc import Callable, Collection
    from pathlib import Path

    from moe_runtime.service.ports import HostReply
    from moe_runtime.transport.curve import Encryption

_INCARNATION_BYTES = INCARNATION_BITS // 8


class ZmqHostTransport:
    """Receives routers' requests and answers them; implements the port ``HostTransport``.

    Memory is bounded by the routers, each of which leaves at most its ``max_outstanding_bytes`` of rows unanswered
    here, and by ``max_queued_messages`` from and to each.

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
        self._near_door = NearDoor(near_path(self._ipc_path))
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
        self._on_ready: dict[Any, Callable[[], None]] = {
            self._waker.fileno(): self._waker.drain,
            self._doorkeeper.socket: self._answer_the_door,
            self._near_door.fileno(): self._near_door.serve_waiting,
        }
        self._only_socket = [(self._socket, READABLE)]
        self._items = [(readable, READABLE) for readable in (self._socket, *self._on_ready)]

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
        for ready, _ in wait_for_any(self._items, timeout_s):
            if ready is self._socket:
                self._accept_waiting(deliveries)
            else:
                self._on_ready[ready]()
        return deliveries

    def reply(self, delivery: Delivery, reply: HostReply) -> None:
        """Answer a delivery without blocking; an answer to a router that is gone is discarded and counted.

        Raises:
            TransportError: If the reply is malformed or too large to travel.
        """
        if self._closed:
            self._counters.num_discarded += 1
            return
        sender = delivery.sender
        is_placed = False
        if isinstance(delivery.lease, ReplySlot) and reply.rows is not None:
            check_reply(reply)
            is_placed = delivery.lease.fill(reply.rows)
        address = Address(self.incarnation, int.from_bytes(sender[:_INCARNATION_BYTES], "big"))
        frames = encode_reply(reply, address=address, is_placed=is_placed)
        try:
            send_now(self._send, [sender[_INCARNATION_BYTES:], *frames])
        except zmq.ZMQError:
            # EHOSTUNREACH: the router is gone. EAGAIN: it does not drain its queue, and no one may wait for it.
            self._counters.num_discarded += 1
            return
        self._counters.num_sent += 1
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

    def _accept_waiting(self, deliveries: list[Delivery]) -> None:
        socket = self._socket
        for _ in range(MAX_MESSAGES_PER_CALL):
            try:
                route = socket.recv(DONTWAIT)
            except zmq.Again:
                return
            # It never comes alone.
            frames = receive_one(socket)
            delivery = None if frames is None else self._accept(route, frames)
            if delivery is not None:
                deliveries.append(delivery)
            if not wait_for_any(self._only_socket, 0.0):
                return

    def _accept(self, route: bytes, frames: list[memoryview]) -> Delivery | None:
        try:
            incoming = decode_request(frames, find=self._near_door.find)
        except TransportError:
            self._counters.num_malformed += 1
            return None
        address, place = incoming.address, incoming.place
        if address.receiver != self.incarnation:
            self._counters.num_refused += 1
            return None
        self._counters.num_received += 1
        sender = address.sender.to_bytes(_INCARNATION_BYTES, "big") + route
        memory = None if place is None else self._near_door.find(place)
        return Delivery(sender, incoming.request, None if memory is None else ReplySlot(memory))
