"""What the router's and the host's ZeroMQ sockets have in common: their options, and waiting for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import zmq

from moe_runtime.errors import StartError
from moe_runtime.transport.header_fields import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Messages that a peer's queue holds, per direction; the sender's side and the receiver's side each.
DEFAULT_MAX_QUEUED_MESSAGES = 1000
#: One call delivers at most this many messages of a socket, so that a flood cannot keep a caller inside.
MAX_MESSAGES_PER_CALL = 1024
#: A host forgets a router that has not sent as much as a heartbeat for so long.
ROUTER_SILENCE_MS = 30_000
#: Plain numbers, since the library's enumerations compute in Python.
READABLE = int(zmq.POLLIN)
DONTWAIT = int(zmq.DONTWAIT)
_DONTWAIT_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
MAX_WAIT_S = 3600.0
_CONNECT_TIMEOUT_MS = 5_000
#: A host that was cut off is lost after the second of these. Less would not do: a packet that is lost once is sent
#: again after 200 ms, and the I/O thread of a host whose node is overloaded may have to wait for longer.
_HEARTBEAT_MS = 100
_MAX_SILENCE_MS = 1_000
#: ZeroMQ would connect again by itself after so long; by then the socket is closed.
_RECONNECT_MS = 3_600_000
#: Connections that wait while a host's I/O thread is busy; the kernel's own limit may be lower.
_BACKLOG = 1024


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, *, max_queued: int) -> zmq.Socket[bytes]:
    """A socket that never blocks its owner: bounded queues, bounded frames, nothing kept when it closes."""
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, max_queued)
    socket.set(zmq.RCVHWM, max_queued)
    socket.set(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
    socket.set(zmq.IPV6, 1)
    socket.set(zmq.BACKLOG, _BACKLOG)
    return socket


def connect_once(socket: zmq.Socket[bytes], address: str) -> None:
    """Connect a socket to whatever process listens at an address now, and to none that comes after it.

    The owner must close the socket when the connection is lost.

    Raises:
        ZMQError: If the address cannot be read.
    """
    # Or what is queued for a dead host would be sent to the next process that binds its address. "Never" (-1) would
    # take the connection's queue away while a message is being read from it, which libzmq answers with an abort.
    socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.set(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _MAX_SILENCE_MS)
    socket.set(zmq.HEARTBEAT_TTL, ROUTER_SILENCE_MS)
    socket.connect(address)


def bind(socket: zmq.Socket[bytes], address: str) -> None:
    """Listen at an address.

    Raises:
        StartError: If that is not possible.
    """
    try:
        socket.bind(address)
    except zmq.ZMQError as exc:
        raise StartError(f"cannot listen at {address}: {exc}") from exc


def bind_tcp(socket: zmq.Socket[bytes], ip: str, port_range: tuple[int, int] | None) -> str:
    """Listen at the first free port of an inclusive range, or at any, and give the address.

    Raises:
        StartError: If no port is free, or the ip is not this machine's.
    """
    host = f"[{ip}]" if ":" in ip else ip
    if port_range is None:
        bind(socket, f"tcp://{host}:*")
        return socket.get_string(zmq.LAST_ENDPOINT)
    first, last = port_range
    for port in range(first, last + 1):
        try:
            socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as exc:
            if exc.errno != zmq.EADDRINUSE:
                raise StartError(f"cannot listen at tcp://{host}:{port}: {exc}") from exc
        else:
            return f"tcp://{host}:{port}"
    raise StartError(f"no free tcp port at {ip} in data_plane.port_range {first} to {last}")


def receive_waiting(socket: zmq.Socket[bytes]) -> Iterator[list[memoryview]]:
    """The frames of each message that has arrived, without copying them and without waiting."""
    only = [(socket, READABLE)]
    for _ in range(MAX_MESSAGES_PER_CALL):
        # To ask costs a tenth of the exception that says no.
        frames = receive_one(socket) if zmq.zmq_poll(only, 0) else None
        if frames is None:
            return
        yield frames


def receive_one(socket: zmq.Socket[bytes]) -> list[memoryview] | None:
    """The frames of the next message, without copying them; None if it is not there any more."""
    try:
        frame: Any = socket.recv(DONTWAIT, False)
    except zmq.Again:
        # A connection that ends may take with it what was there a moment ago.
        return None
    frames = [frame.buffer]
    while frame.more:
        frame = socket.recv(0, False)
        frames.append(frame.buffer)
    return frames


def sender_of(socket: zmq.Socket[bytes]) -> Callable[..., Any]:
    """The ``send`` of a socket, in C; the one that wraps it serves draft sockets, for three times the price."""
    send: Callable[..., Any] = super(zmq.Socket, socket).send
    return send


def send_now(send: Callable[..., Any], frames: list[Any]) -> None:
    """Queue a message without waiting; frames other than bytes are sent from where they are.

    Args:
        send: Of the socket, by ``sender_of``.
        frames: The message.

    Raises:
        ZMQError: ``Again`` if the queue is full; another if there is nobody at its end.
    """
    if len(frames) == 1:
        send(frames[0], DONTWAIT)
        return
    for frame in frames[:-1]:
        send(frame, _DONTWAIT_MORE, isinstance(frame, bytes))
    frame = frames[-1]
    send(frame, DONTWAIT, isinstance(frame, bytes))


def wait_for_any(items: list[tuple[Any, int]], timeout_s: float) -> list[tuple[Any, int]]:
    """Those of some sockets and descriptors that are readable within a time, or now if it is 0.

    Args:
        items: Each with ``READABLE``.
        timeout_s: How long to wait for the first.

    Returns:
        Each that is, with what it is.
    """
    return zmq.zmq_poll(items, math.ceil(min(timeout_s, MAX_WAIT_S) * 1000) if timeout_s > 0 else 0)
