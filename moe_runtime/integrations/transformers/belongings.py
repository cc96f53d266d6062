"""What a model's experts hold of this machine is given back once: closed, forgotten, or at the end of the process."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import ExitStack


class Belongings:
    """Resources that are given back once, by whoever is first.

    Args:
        stack: Gives them back when it is closed.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._is_given_back = False
        self._pid = os.getpid()
        # After Ray was imported, so that this is called before it leaves its cluster.
        atexit.register(self.give_back)

    @property
    def is_given_back(self) -> bool:
        """Whether they are, or are being."""
        return self._is_given_back

    def give_back(self) -> None:
        """Give them back, unless that was done before, or they are those of the process that this is a fork of."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._is_given_back:
                return
            self._is_given_back = True
        atexit.unregister(self.give_back)
        self._stack.close()

    def give_back_with(self, owner: object) -> None:
        """Give them back when an object is no longer used; ``stack`` must not refer to it."""
        weakref.finalize(owner, self._give_back_aside).atexit = False

    def _give_back_aside(self) -> None:
        # Garbage is collected anywhere, under anyone's locks: what waits for others must not run there.
        if not self._is_given_back:
            threading.Thread(target=self.give_back, name="moe-runtime-give-back").start()
