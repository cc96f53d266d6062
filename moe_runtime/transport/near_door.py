"""The host's side of the Unix sockets from routers on its node: maps the memory that they share with it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import StartError
from moe_runtime.transport.near_channel import ANSWER, OFFER
from moe_runtime.transport.shared_memory import map_segment

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe_runtime.transport.header_fields import Place


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


class NearDoor:
    """Listens beside the ipc socket of a host; owned by the host's thread, and waits for nobody."""

    def __init__(self, path: Path) -> None:
        """Listen.

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
        self._routers: dict[int, socket.socket] = {}
        self._segments: dict[int, memoryview] = {}
        self._segments_of: dict[int, list[int]] = {}
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._epoll.fileno()

    def serve_waiting(self) -> None:
        """Let routers in, map what they offer, and forget those that are gone."""
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._let_in()
            else:
                self._hear(descriptor)

    def find(self, place: Place) -> memoryview | None:
        """The memory at a place; None if it is not all in a segment that a router here shares."""
        memory = self._segments.get(place.segment_id)
        stop = place.offset + place.num_bytes
        return None if memory is None or stop > memory.nbytes else memory[place.offset : stop]

    def close(self) -> None:
        """Stop listening and let go of all memory; tensors that lie in it keep what they need."""
        for descriptor in [*self._routers]:
            self._show_out(descriptor)
        self._epoll.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):
            router, _ = self._listener.accept()
            router.setblocking(False)
            self._routers[router.fileno()] = router
            self._segments_of[router.fileno()] = []
            self._epoll.register(router, select.EPOLLIN)

    def _hear(self, descriptor: int) -> None:
        router = self._routers[descriptor]
        try:
            offer, segments, _, _ = socket.recv_fds(router, OFFER.size, 1)
        except BlockingIOError:
            return
        except OSError:
            offer, segments = b"", []
        if len(offer) != OFFER.size or len(segments) != 1:
            for segment in segments:
                os.close(segment)
            self._show_out(descriptor)
            return
        segment_id, num_bytes = OFFER.unpack(offer)
        is_usable = self._map(descriptor, segments[0], segment_id=segment_id, num_bytes=num_bytes)
        with contextlib.suppress(OSError):
            router.send(ANSWER.pack(segment_id, is_usable))

    def _map(self, descriptor: int, segment: int, *, segment_id: int, num_bytes: int) -> bool:
        try:
            memory = map_segment(segment, num_bytes)
        except (OSError, ValueError, OverflowError):
            return False
        finally:
            os.close(segment)
        self._segments[segment_id] = memory
        self._segments_of[descriptor].append(segment_id)
        return True

    def _show_out(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        self._routers.pop(descriptor).close()
        for segment_id in self._segments_of.pop(descriptor):
            self._segments.pop(segment_id, None)


def _may_overlap(rows: Tensor, memory: memoryview, address: int) -> bool:
    storage = rows.untyped_storage()
    return storage.data_ptr() < address + memory.nbytes and address < storage.data_ptr() + storage.nbytes()
