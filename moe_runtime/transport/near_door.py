"""The host's side of the Unix sockets from routers on its node: short messages, and the memory that they share."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.errors import StartError
from moe_runtime.transport.near_channel import ANSWER, BUFFER_BYTES, MAX_PACKET_BYTES, OFFER, ROUTE_BYTES
from moe_runtime.transport.shared_memory import map_segment

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe_runtime.transport.header_fields import Place

_DESCRIPTOR = struct.Struct("=i")
_ONE_DESCRIPTOR = socket.CMSG_LEN(_DESCRIPTOR.size)


class ReplySlot:
    """Shared memory that came with a request and takes the rows of its reply, once."""

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory

    def fill(self, rows: Tensor) -> bool:
        """Whether the rows have been put there; not if they do not fit, or others were before them."""
        memory, self._memory = self._memory, None
        if memory is None or not 0 < rows.nbytes <= memory.nbytes:
            return False
        target = torch.frombuffer(memory, dtype=rows.dtype, count=rows.numel()).view(rows.shape)
        if rows.is_cpu and rows.data_ptr() == target.data_ptr() and rows.is_contiguous():
            # An expert that answers with its input, which lies there already.
            return True
        target.copy_(rows.clone() if _may_overlap(rows, memory, target.data_ptr()) else rows)
        return True


class Visitor:
    """A router's connection.

    Attributes:
        route: How the host's ZeroMQ socket knows that router; None until it has said so.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.route: bytes | None = None
        self.segment_ids: list[int] = []
        self.connection = connection

    def try_send(self, message: bytes) -> bool:
        """Whether the router gets a message this way, unless it ends before; False if there is no room for it."""
        if len(message) > MAX_PACKET_BYTES:
            return False
        try:
            self.connection.send(message)
        except OSError:
            return False
        return True


class Heard(NamedTuple):
    """A message, until the next one is heard, and whose it is."""

    visitor: Visitor
    message: memoryview


class NearDoor:
    """Listens beside the ipc socket of a host; owned by the host's thread, and waits for nobody."""

    def __init__(self, path: Path, *, epoll: select.epoll) -> None:
        """Listen.

        Args:
            path: Where.
            epoll: Watches this descriptor, and those of the routers that are let in.

        Raises:
            StartError: If the path cannot be bound.
        """
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        try:
            self._listener.bind(os.fsencode(path))
            self._listener.listen(socket.SOMAXCONN)
        except OSError as exc:
            self._listener.close()
            raise StartError(f"cannot listen at {path}: {exc}") from exc
        self._visitors: dict[int, Visitor] = {}
        self._segments: dict[int, memoryview] = {}
        self._packet = memoryview(bytearray(MAX_PACKET_BYTES))
        self._epoll = epoll
        self._epoll.register(self._listener, select.EPOLLIN)

    def hear(self, descriptor: int) -> Heard | None:
        """What there is at a descriptor that is readable: a message; None for anything else, which is seen to."""
        visitor = self._visitors.get(descriptor)
        if visitor is None:
            if descriptor == self._listener.fileno():
                self._let_in()
            return None
        try:
            num_bytes, attached, _, _ = visitor.connection.recvmsg_into(
                (self._packet,), _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            num_bytes, attached = 0, []
        if num_bytes and not attached and visitor.route is not None:
            return Heard(visitor, self._packet[:num_bytes])
        self._see_to(visitor, self._packet[:num_bytes], attached)
        return None

    def find(self, place: Place) -> memoryview | None:
        """The memory at a place; None if it is not all in a segment that a router here shares."""
        memory = self._segments.get(place.segment_id)
        stop = place.offset + place.num_bytes
        return None if memory is None or stop > memory.nbytes else memory[place.offset : stop]

    def close(self) -> None:
        """Stop listening and let go of all memory; tensors that lie in it keep what they need."""
        for visitor in [*self._visitors.values()]:
            self.show_out(visitor)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def show_out(self, visitor: Visitor) -> None:
        """Close a router's connection and forget its memory."""
        if self._visitors.pop(visitor.connection.fileno(), None) is None:
            return
        self._epoll.unregister(visitor.connection)
        visitor.connection.close()
        for segment_id in visitor.segment_ids:
            self._segments.pop(segment_id, None)

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            self._visitors[connection.fileno()] = Visitor(connection)
            self._epoll.register(connection, select.EPOLLIN)

    def _see_to(self, visitor: Visitor, packet: memoryview, attached: list[tuple[int, int, bytes]]) -> None:
        """Take what is no message: how the router is known, or memory that it offers; anything else is its end."""
        descriptors = [descriptor for _, _, data in attached for descriptor in _descriptors_in(data)]
        if visitor.route is None and len(packet) == ROUTE_BYTES and not descriptors:
            visitor.route = bytes(packet)
        elif visitor.route is not None and len(packet) == OFFER.size and len(descriptors) == 1:
            segment_id, num_bytes = OFFER.unpack(packet)
            is_usable = self._map(visitor, descriptors.pop(), segment_id=segment_id, num_bytes=num_bytes)
            visitor.try_send(ANSWER.pack(segment_id, is_usable))
        else:
            self.show_out(visitor)
        for descriptor in descriptors:
            os.close(descriptor)

    def _map(self, visitor: Visitor, segment: int, *, segment_id: int, num_bytes: int) -> bool:
        try:
            memory = map_segment(segment, num_bytes)
        except (OSError, ValueError, OverflowError):
            return False
        finally:
            os.close(segment)
        self._segments[segment_id] = memory
        visitor.segment_ids.append(segment_id)
        return True


def _descriptors_in(data: bytes) -> tuple[int, ...]:
    whole = len(data) - len(data) % _DESCRIPTOR.size
    return tuple([descriptor for (descriptor,) in _DESCRIPTOR.iter_unpack(data[:whole])])


def _may_overlap(rows: Tensor, memory: memoryview, address: int) -> bool:
    storage = rows.untyped_storage()
    return storage.data_ptr() < address + memory.nbytes and address < storage.data_ptr() + storage.nbytes()
