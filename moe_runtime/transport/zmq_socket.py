"""What the router's and the host's ZeroMQ sockets have in common: their options, and waiting for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import zmq

from moe_runtime.transport.header import MAX_ROWS_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Messages that a peer's queue holds, per direction; the sender's side and the receiver's side each.
DEFAULT_MAX_QUEUED_MESSAGES = 1000
#: One call delivers at most this many messages of a socket, so that a flood cannot keep a caller inside.
MAX_MESSAGES_PER_CALL = 1024
_MAX_WAIT_S = 3600.0


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, *, max_queued: int) -> zmq.Socket[bytes]:
    """A socket that never blocks its owner: bounded queues, bounded frames, nothing kept when it closes."""
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, max_queued)
    socket.set(zmq.RCVHWM, max_queued)
    socket.set(zmq.MAXMSGSIZE, MAX_ROWS_BYTES)
    socket.set(zmq.IPV6, 1)
    return socket


def receive_waiting(socket: zmq.Socket[bytes]) -> Iterator[list[memoryview]]:
    """The frames of each message that has arrived, without copying them and without waiting."""
    for _ in range(MAX_MESSAGES_PER_CALL):
        try:
            frames: list[Any] = socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return
        yield [frame.buffer for frame in frames]


def wait_for_any(poller: zmq.Poller, timeout_s: float) -> list[Any]:
    """Registered sockets and descriptors that are readable within a time; those that are now, if it is 0."""
    timeout_ms = math.ceil(min(max(timeout_s, 0.0), _MAX_WAIT_S) * 1000)
    return [ready for ready, _ in poller.poll(timeout_ms)]
