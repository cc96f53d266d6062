"""Tells when the one connection of a socket has ended, and why."""

from __future__ import annotations

import itertools
import os
import select
import struct
from typing import NamedTuple

import zmq

_NUMBERS = itertools.count()
#: First frame of a monitor's message: the event, and a value that depends on it.
_EVENT = struct.Struct("=HI")
_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class LinkLoss(NamedTuple):
    """Why a link is lost.

    Attributes:
        reason: In words.
        is_death: Whether the process at its other end has ended, as far as can be told.
    """

    reason: str
    is_death: bool


LINK_ENDED = LinkLoss("its process ended", is_death=True)
LINK_HUNG_UP = LinkLoss("it hung up", is_death=False)
LINK_SILENT = LinkLoss("it was silent for too long: its process froze, or was cut off", is_death=False)
LINK_FROZEN = LinkLoss("its process is frozen", is_death=False)
_HANDSHAKE_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the host does not admit this router's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: the host speaks another protocol or has another key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: the host is silent or has another key",
}
_ENDS = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_EVENTS = _ENDS | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
for _event in _HANDSHAKE_FAILURES:
    _EVENTS |= _event


class LinkMonitor:
    """Watches a socket that connects once; to be made before it connects, and closed before it is.

    A link is lost when it breaks, when nobody listens at its address, or when its handshake fails. A host that
    accepts connections is never lost for being busy: its I/O thread answers for it.

    ZeroMQ does not say whether a link broke because the other process ended, or because it was silent for too long.
    The connection itself knows: it was hung up, or it was not. So a second descriptor of it is kept.
    """

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        address = f"inproc://link-monitor-{next(_NUMBERS)}"
        watched.monitor(address, _EVENTS)
        self._watched = watched
        self._is_up = False
        self._failure: str | None = None
        self._loss: LinkLoss | None = None
        self._connection: int | None = None
        self._socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)
        # Only a reader that has found nothing is signalled.
        self.loss()

    def fileno(self) -> int:
        """A descriptor that becomes readable once per change, until ``loss`` is asked."""
        return int(self._socket.get(zmq.FD))

    def loss(self) -> LinkLoss | None:
        """Why the link is lost; None while it is up, or coming up."""
        while self._loss is None:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            self._note(*_EVENT.unpack(frames[0]))
        return self._loss

    def is_up(self) -> bool:
        """Whether the handshake has succeeded and the link is not lost."""
        return self.loss() is None and self._is_up

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self._socket.close()
        self._let_go()

    def _note(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._hold(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_up = True
        elif event in _HANDSHAKE_FAILURES:
            self._failure = _HANDSHAKE_FAILURES[event]
        else:
            self._loss = self._judge(event)
            self._let_go()

    def _judge(self, event: int) -> LinkLoss:
        if self._is_up:
            return LINK_ENDED if self._connection is None or _is_hung_up(self._connection) else LINK_SILENT
        if event == zmq.EVENT_CLOSED:
            return LinkLoss("nobody listens at its address", is_death=False)
        return LinkLoss(self._failure or "the connection ended before the handshake", is_death=False)

    def _hold(self, descriptor: int) -> None:
        self._let_go()
        try:
            self._connection = os.dup(descriptor)
        except OSError:
            # It has ended already: not for having been silent.
            self._connection = None

    def _let_go(self) -> None:
        if self._connection is not None:
            os.close(self._connection)
            self._connection = None


def _is_hung_up(connection: int) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return any(events & _HUNG_UP for _, events in poll.poll(0))
