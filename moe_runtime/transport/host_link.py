"""A router's connection to one incarnation of an expert host: its sockets, its monitor and what is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import zmq

from moe_runtime.errors import TransportError
from moe_runtime.transport.curve import secure_connection
from moe_runtime.transport.header_fields import Address
from moe_runtime.transport.link_monitor import LINK_ENDED, LINK_HUNG_UP, LinkMonitor
from moe_runtime.transport.near_channel import NearChannel
from moe_runtime.transport.row_frames import MAX_INLINE_BYTES
from moe_runtime.transport.tickets import OutstandingTickets
from moe_runtime.transport.zmq_socket import connect_once, open_socket, send_now, sender_of

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.service.ports import Endpoint
    from moe_runtime.transport.arena import Slot
    from moe_runtime.transport.curve import KeyPair
    from moe_runtime.transport.link_monitor import LinkLoss


@dataclass(frozen=True)
class LinkLimits:
    """What one connection may take.

    Attributes:
        max_queued_messages: Messages that wait in its socket.
        max_outstanding_bytes: Rows that the host holds unanswered.
        max_shared_bytes: Memory shared with a host on the router's node.
    """

    max_queued_messages: int
    max_outstanding_bytes: int
    max_shared_bytes: int


class HostLink:
    """One DEALER that connects once, to one process; it is closed, not repaired, when that process is lost."""

    def __init__(
        self,
        endpoint: Endpoint,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        incarnation: int,
        node: str,
        keys: KeyPair | None,
        limits: LinkLimits,
    ) -> None:
        """Start to connect.

        Args:
            endpoint: The host's.
            context: Where the socket lives.
            incarnation: The router's.
            node: The router's node; an endpoint there is reached at its local address.
            keys: The router's, where connections to other nodes are encrypted.
            limits: What the connection may take.

        Raises:
            TransportError: If the endpoint has no address for this node, or its keys are not as expected.
        """
        self.endpoint = endpoint
        #: Of requests to the host, and of its replies.
        self.to_host = Address(incarnation, endpoint.incarnation)
        self.from_host = Address(endpoint.incarnation, incarnation)
        self.outstanding = OutstandingTickets()
        self.channel: NearChannel | None = None
        self._limits = limits
        # By address of the rows that they were allocated for; an entry whose slot is free is out of date.
        self._allocated: dict[int, Slot] = {}
        self._away: dict[int, Slot] = {}
        is_near = endpoint.node == node and endpoint.local is not None
        self.address = _address_of(endpoint, node=node, is_near=is_near)
        self.socket = open_socket(context, zmq.DEALER, max_queued=limits.max_queued_messages)
        self._send = sender_of(self.socket)
        self.monitor = LinkMonitor(self.socket)
        #: Whether the host has answered through the socket: then it knows the way, should a reply be too long.
        self._is_known = False
        try:
            if is_near:
                self.channel = NearChannel.open(endpoint, max_bytes=limits.max_shared_bytes)
            else:
                _secure(self.socket, endpoint, keys)
            if self.channel is not None:
                self.socket.set(zmq.ROUTING_ID, self.channel.route)
            connect_once(self.socket, self.address)
        except (zmq.ZMQError, TransportError) as exc:
            self.close()
            raise TransportError(f"endpoint {self.address}: cannot connect: {exc}") from exc

    def has_credit(self, num_bytes: int) -> bool:
        """Whether the host may be given so many more bytes; a host with nothing to do may be given any number."""
        held = self.outstanding.num_bytes
        return not held or held + num_bytes <= self._limits.max_outstanding_bytes

    def loss(self) -> LinkLoss | None:
        """Why the connection is lost; None while it is up, or coming up."""
        loss = self.monitor.loss()
        return self.end() if loss is LINK_ENDED else loss

    def end(self) -> LinkLoss:
        """Why a connection that the host's end has closed is lost."""
        return LINK_ENDED if self.channel is None or self.channel.has_ended() else LINK_HUNG_UP

    def is_up(self) -> bool:
        """Whether the host has answered the handshake, and is not lost."""
        return self.monitor.is_up()

    def is_frozen(self) -> bool:
        """Whether the host's process is known to be stopped."""
        return self.channel is not None and self.channel.is_frozen()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory shared with the host, for the rows of one request; None where they would not be better off."""
        num_bytes = math.prod(shape) * dtype.itemsize
        slot = self._lend(num_bytes)
        if slot is None:
            return None
        rows = torch.frombuffer(slot.view(num_bytes), dtype=dtype).view(shape)
        self._allocated[rows.data_ptr()] = slot
        return rows

    def place(self, rows: Tensor) -> Slot | None:
        """The slot that holds some rows, which are copied there unless ``allocate`` gave them; None if none does.

        Raises:
            TransportError: If they were allocated here and have been sent before.
        """
        if rows.nbytes <= MAX_INLINE_BYTES:
            return None
        slot = self._allocated.get(rows.data_ptr())
        if slot is not None and slot.is_away:
            raise TransportError("rows that were allocated for one request have been sent before")
        if slot is not None and slot.is_unsent and not slot.is_free and rows.nbytes <= slot.place.num_bytes:
            return slot
        slot = self._lend(rows.nbytes)
        if slot is not None:
            torch.frombuffer(slot.view(rows.nbytes), dtype=rows.dtype).view(rows.shape).copy_(rows.detach())
        return slot

    def wants_to_share(self, num_bytes: int) -> bool:
        """Whether rows of this size are meant to travel in shared memory."""
        return self.channel is not None and num_bytes > MAX_INLINE_BYTES and self._limits.max_shared_bytes > 0

    def try_send_near(self, frames: list[Any]) -> bool:
        """Send a short request through the channel; False if it must go through the socket."""
        channel = self.channel
        return self._is_known and channel is not None and len(frames) == 1 and channel.try_send(frames[0])

    def try_send(self, frames: list[Any]) -> bool:
        """Queue a request in the socket without waiting; False if its queue is full."""
        try:
            send_now(self._send, frames)
        except zmq.Again:
            return False
        return True

    def expect(self, ticket: int, *, num_bytes: int, slot: Slot | None) -> None:
        """Note that a request was sent."""
        self.outstanding.add(ticket, num_bytes)
        if slot is not None:
            slot.is_unsent, slot.is_away = False, True
            self._away[ticket] = slot

    def note_known(self) -> None:
        """Note that a reply came through the socket."""
        self._is_known = True

    def hung_up(self) -> bool:
        """Give up the channel, which the host has closed; whether requests went with it."""
        self._is_known = False
        return len(self.outstanding) > 0

    def find(self, ticket: int, num_bytes: int) -> memoryview | None:
        """The first bytes of the slot that a ticket's request lies in; None if it lies in none so large."""
        slot = self._away.get(ticket)
        return None if slot is None else slot.view(num_bytes)

    def expects(self, ticket: int) -> bool:
        """Whether a reply to this ticket is expected."""
        return ticket in self.outstanding

    def take(self, ticket: int) -> bool:
        """Whether a reply to this ticket was expected; it no longer is afterwards."""
        slot = self._away.pop(ticket, None)
        if slot is not None:
            slot.come_back()
        return self.outstanding.take(ticket)

    def close(self) -> None:
        """Break the connection; what is queued is discarded."""
        self.monitor.close()
        self.socket.close()
        if self.channel is not None:
            self.channel.close()

    def _lend(self, num_bytes: int) -> Slot | None:
        if self.channel is None or not self.wants_to_share(num_bytes):
            return None
        return self.channel.lend(num_bytes)


def _address_of(endpoint: Endpoint, *, node: str, is_near: bool) -> str:
    address = endpoint.local if is_near else endpoint.remote
    if address is None:
        raise TransportError(
            f"endpoint {endpoint.incarnation:016x} on node {endpoint.node} cannot be reached from node "
            f"{node}: it has no address for other nodes"
        )
    return address


def _secure(socket: zmq.Socket[bytes], endpoint: Endpoint, keys: KeyPair | None) -> None:
    if (keys is None) != (endpoint.public_key is None):
        ours, theirs = ("none", "curve") if keys is None else ("curve", "none")
        raise TransportError(f"expected data_plane.encryption {ours} as here, found {theirs}")
    if keys is not None and endpoint.public_key is not None:
        secure_connection(socket, keys, host_key=endpoint.public_key)
