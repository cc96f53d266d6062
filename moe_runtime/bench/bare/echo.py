"""The limit of the data plane: the same bytes there and back over bare ZeroMQ, with nothing in between."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from moe_runtime.bench.children import Child

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    import numpy as np
    from numpy.typing import NDArray

#: As many bytes as a small message of the data plane has before its rows.
_HEADER = bytes(128)


def serve_echo(connection: Connection, address: str) -> None:
    """Send every message back to where it came from, until the parent closes the connection."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(address)
    connection.send("ready")
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(connection.fileno(), zmq.POLLIN)
    while connection.fileno() not in dict(poller.poll()):
        with contextlib.suppress(zmq.Again):
            while True:
                socket.send_multipart(socket.recv_multipart(zmq.DONTWAIT, copy=False), copy=False)
    context.destroy(linger=0)


class EchoFleet:
    """Processes that echo, one DEALER to each; used by one thread."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Connect to the echoing processes at some addresses."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets = [self._context.socket(zmq.DEALER) for _ in addresses]
        self._poller = zmq.Poller()
        for socket, address in zip(self._sockets, addresses, strict=True):
            socket.connect(address)
            self._poller.register(socket, zmq.POLLIN)

    def exchange(self, parts: Sequence[NDArray[np.float32]]) -> None:
        """Send the i-th part to the i-th process, where it has rows, and receive all of them back."""
        num_open = 0
        for socket, part in zip(self._sockets, parts, strict=True):
            if len(part):
                socket.send_multipart([_HEADER, part.data], copy=False)
                num_open += 1
        while num_open:
            for socket, _ in self._poller.poll():
                socket.recv_multipart(copy=False)
                num_open -= 1

    def close(self) -> None:
        """Disconnect."""
        self._context.destroy(linger=0)


@contextlib.contextmanager
def echo_fleet(num_processes: int) -> Iterator[EchoFleet]:
    """So many processes that echo, until the end of the ``with``."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-bench-")))
        addresses = [f"ipc://{folder}/{i}" for i in range(num_processes)]
        children = [stack.enter_context(Child(serve_echo, address)) for address in addresses]
        for child in children:
            child.answer()
        fleet = EchoFleet(addresses)
        stack.callback(fleet.close)
        yield fleet
