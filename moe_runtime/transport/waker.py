"""A descriptor that one thread polls and any thread can make readable."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """Interrupts a poll from another thread; calls before the poll count, and several count as one."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """Make the descriptor readable. Thread-safe; without effect after ``close``."""
        # A full buffer means that a wake-up is waiting already; a closed socket, that nobody polls any more.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def drain(self) -> None:
        """Take back every wake-up so far."""
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        """Release both descriptors. Safe to call twice."""
        self._receiver.close()
        self._sender.close()
