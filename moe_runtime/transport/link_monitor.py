"""Tells when the one connection of a socket has ended, and why."""

from __future__ import annotations

import itertools
import struct

import zmq

_NUMBERS = itertools.count()
#: First frame of a monitor's message: the event, and a value that depends on it.
_EVENT = struct.Struct("=HI")
#: Why a link that was up is lost.
LINK_ENDED = "its process ended, froze, or was cut off"
_HANDSHAKE_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the host does not admit this router's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: the host speaks another protocol or has another key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: the host is silent or has another key",
}
_ENDS = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_EVENTS = _ENDS | zmq.EVENT_HANDSHAKE_SUCCEEDED
for _event in _HANDSHAKE_FAILURES:
    _EVENTS |= _event


class LinkMonitor:
    """Watches a socket that connects once; to be made before it connects, and closed before it is.

    A link is lost when it breaks, when nobody listens at its address, or when its handshake fails. A host that
    accepts connections is never lost for being busy: its I/O thread answers for it.
    """

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        address = f"inproc://link-monitor-{next(_NUMBERS)}"
        watched.monitor(address, _EVENTS)
        self._watched = watched
        self._is_up = False
        self._failure: str | None = None
        self._loss: str | None = None
        self._socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)
        # Only a reader that has found nothing is signalled.
        self.loss()

    def fileno(self) -> int:
        """A descriptor that becomes readable once per change, until ``loss`` is asked."""
        return int(self._socket.get(zmq.FD))

    def loss(self) -> str | None:
        """Why the link is lost, in words; None while it is up, or coming up."""
        while self._loss is None:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            event, _ = _EVENT.unpack(frames[0])
            self._note(event)
        return self._loss

    def is_up(self) -> bool:
        """Whether the handshake has succeeded and the link is not lost."""
        return self.loss() is None and self._is_up

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self._socket.close()

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_up = True
        elif event in _HANDSHAKE_FAILURES:
            self._failure = _HANDSHAKE_FAILURES[event]
        elif self._is_up:
            self._loss = LINK_ENDED
        elif event == zmq.EVENT_CLOSED:
            self._loss = "nobody listens at its address"
        else:
            self._loss = self._failure or "the connection ended before the handshake"
