"""The router's side of a Unix socket to a host on its node.

It carries short messages, which takes no other thread at either end, hands over shared memory for long ones, and
tells of a frozen process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from typing import TYPE_CHECKING

from moe_runtime.transport.arena import Arena, whole_pages
from moe_runtime.transport.ipc_folder import near_path, path_of
from moe_runtime.transport.shared_memory import create_segment

if TYPE_CHECKING:
    from moe_runtime.service.ports import Endpoint
    from moe_runtime.transport.arena import Slot

#: Longest message; what is longer, or finds no room in the kernel's buffer, goes through ZeroMQ.
MAX_PACKET_BYTES = 64 << 10
#: What each end may have in the kernel's buffer, which may grant less.
BUFFER_BYTES = 1 << 20
#: A router's first packet: how the host's ZeroMQ socket knows it. The first byte must not be 0.
ROUTE_BYTES = 17
#: What a router says of a segment, beside its descriptor: id and bytes.
OFFER = struct.Struct("=QQ")
#: What the host says of it: id, and whether it can use it. No message is so short.
ANSWER = struct.Struct("=Q?")
_CREDENTIALS = struct.Struct("=iII")
_MIN_SEGMENT_BYTES = 1 << 20
#: Of /proc/<id>/stat: place of the kernel's flags after the name, and the one of a process that is ending.
_FLAGS, _PF_EXITING = 6, 0x4


class NearChannel:
    """One connection to one host process; ends with it. None of its methods waits.

    Segments are made when rows want to travel and there is no room for them, and used once the host has mapped
    them; until then, and beyond ``max_bytes``, rows travel as frames.
    """

    def __init__(self, connection: socket.socket, *, max_bytes: int) -> None:
        self.arena = Arena()
        self.route = b"r" + secrets.token_bytes(ROUTE_BYTES - 1)
        self._connection = connection
        self._max_bytes = max_bytes
        self._offered: tuple[int, memoryview] | None = None
        self._is_growing = True
        self._state = _open_process_state(connection)
        self._was_stopped = False

    @classmethod
    def open(cls, endpoint: Endpoint, *, max_bytes: int) -> NearChannel | None:
        """The channel to a host on this node; None if it offers none."""
        path = path_of(endpoint.local)
        if path is None:
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            connection.connect(os.fsencode(near_path(path)))
            channel = cls(connection, max_bytes=max_bytes)
            connection.send(channel.route)
        except OSError:
            connection.close()
            return None
        return channel

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._connection.fileno()

    def is_frozen(self) -> bool:
        """Whether the host's process was found stopped (by SIGSTOP), this time and the last.

        Silence would not tell: a process that gets no time on a busy machine is silent, too.
        """
        is_stopped = self._state is not None and _is_stopped(self._state)
        was_stopped, self._was_stopped = self._was_stopped, is_stopped
        return is_stopped and was_stopped

    def has_ended(self) -> bool:
        """Whether the host's process has ended, or is about to; True where nobody can tell."""
        if self._state is None:
            return True
        fields = _read(self._state).split()
        # A process that ends closes its sockets long before it is gone.
        return not fields or fields[0] in b"ZX" or bool(int(fields[_FLAGS]) & _PF_EXITING)

    def lend(self, num_bytes: int) -> Slot | None:
        """A slot of at least so many bytes; None if there is none now."""
        slot = self.arena.lend(num_bytes)
        if slot is None and self._is_growing and self._offered is None:
            self._grow(num_bytes)
        return slot

    def try_send(self, message: bytes) -> bool:
        """Whether the host gets a message this way, unless it ends before; False if there is no room for it."""
        if len(message) > MAX_PACKET_BYTES:
            return False
        try:
            self._connection.send(message)
        except OSError:
            return False
        return True

    def read(self, buffer: memoryview) -> memoryview | None:
        """The host's next message, in ``buffer``; empty if there is none; None once the host has hung up."""
        while True:
            try:
                num_bytes = self._connection.recv_into(buffer)
            except BlockingIOError:
                return buffer[:0]
            except OSError:
                num_bytes = 0
            if num_bytes > ANSWER.size:
                return buffer[:num_bytes]
            if num_bytes < ANSWER.size:
                self._hang_up()
                return None
            # The host may have hung up since: then what it answered holds no more.
            self._take(*ANSWER.unpack(buffer[:num_bytes]))

    def close(self) -> None:
        """Let go of the memory, at both ends; tensors that lie in it keep what they need."""
        self._connection.close()
        if self._state is not None:
            os.close(self._state)
            self._state = None

    def _hang_up(self) -> None:
        # The host has forgotten the segments; requests that it has already keep what they need.
        self.arena = Arena()
        self._offered = None
        self._is_growing = False

    def _take(self, segment_id: int, is_usable: bool) -> None:
        if self._offered is None or self._offered[0] != segment_id:
            return
        if is_usable:
            self.arena.add(*self._offered)
        self._is_growing = is_usable
        self._offered = None

    def _grow(self, num_bytes: int) -> None:
        """Offer a segment: as large as all before, so that there are few, and with room for two such requests."""
        room = self._max_bytes - self.arena.num_bytes
        wanted = max(whole_pages(2 * num_bytes), self.arena.num_bytes, _MIN_SEGMENT_BYTES)
        size = min(wanted, room)
        if size < num_bytes:
            return
        segment_id = secrets.randbits(64)
        try:
            descriptor, memory = create_segment(size)
            try:
                socket.send_fds(self._connection, [OFFER.pack(segment_id, size)], [descriptor])
            finally:
                os.close(descriptor)
        except OSError:
            # No memory to spare, or nobody at the other end: frames will do.
            self._is_growing = False
            return
        self._offered = (segment_id, memory)


def _open_process_state(connection: socket.socket) -> int | None:
    """Descriptor of the peer's state in /proc; it means this process, even when its id is used again."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(credentials)
    # Of the main thread, since the whole process's takes longer; a signal stops all. The id is 0 in another
    # container.
    with contextlib.suppress(OSError):
        return os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    return None


def _is_stopped(state: int) -> bool:
    # T is stopped by a signal; t, by a debugger or a profiler, does not last.
    return _read(state)[1:2] == b"T"


def _read(state: int) -> bytes:
    """The state's fields after the name, the first of which is one letter; nothing once the process is gone."""
    try:
        fields = os.pread(state, 256, 0)
    except ProcessLookupError:
        return b""
    # "id (name) state ...", and a name may hold anything.
    return fields.rpartition(b")")[2]
