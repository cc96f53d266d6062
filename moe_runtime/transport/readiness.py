"""Waiting for descriptors, and for ZeroMQ sockets, whose descriptors do not tell everything."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

from moe_runtime.transport.zmq_socket import MAX_WAIT_S, READABLE, receive_one, wait_for_any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Readiness:
    """Calls what is to be done when a descriptor is readable; owned by one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on_ready: dict[int, Callable[[], None]] = {}

    def watch(self, descriptor: int, on_ready: Callable[[], None]) -> None:
        """Call ``on_ready`` in each wait that finds the descriptor readable."""
        self._on_ready[descriptor] = on_ready
        self._epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor that is still open; one that is not watched is no mistake."""
        if self._on_ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def wait(self, timeout_s: float) -> None:
        """Wait for the first descriptor, and call what is to be done for each that is readable."""
        for descriptor, _ in self._epoll.poll(max(0.0, min(timeout_s, MAX_WAIT_S))):
            # Not there any more if another event of this round was its end.
            on_ready = self._on_ready.get(descriptor)
            if on_ready is not None:
                on_ready()

    def close(self) -> None:
        """Forget all descriptors."""
        self._epoll.close()


class SocketsToAsk:
    """ZeroMQ sockets that may have messages of which their descriptors tell nothing.

    A socket's descriptor is signalled only after the socket was asked and had nothing: so each is asked after its
    descriptor was readable, and after anything was sent through it or received.
    """

    def __init__(self) -> None:
        self._items: dict[Any, tuple[Any, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, socket: Any) -> None:
        """Ask this socket, too."""
        self._items[socket] = (socket, READABLE)

    def discard(self, socket: Any) -> None:
        """Do not ask this socket."""
        self._items.pop(socket, None)

    def take(self) -> Iterator[tuple[Any, list[memoryview]]]:
        """One message of each socket that has some; the others are asked no more."""
        readable = dict(wait_for_any([*self._items.values()], 0.0))
        for socket in [*self._items]:
            if socket not in readable:
                del self._items[socket]
                continue
            frames = receive_one(socket)
            if frames is not None:
                yield socket, frames
