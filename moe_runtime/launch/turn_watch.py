"""Whether a thread that serves in turns still takes them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


class TurnWatch:
    """Asks a thread for its next turn, and finds that it stands still when that does not come for long.

    A thread that is slow takes turns as well, however late: only one that takes none at all stands still.
    """

    def __init__(
        self, ask: Callable[[], Future[None]], *, limit_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask nothing yet.

        Args:
            ask: Gives a future that is done when the thread has taken its next turn.
            limit_s: How long a turn may take.
            now: Tells the time.
        """
        self._ask = ask
        self._limit_s = limit_s
        self._now = now
        self._turn: Future[None] | None = None
        self._asked_at = 0.0

    def stands_still(self) -> bool:
        """Whether the turn that was asked for first has not come in time. Never waits; to be called every second."""
        if self._turn is None or self._turn.done():
            self._turn, self._asked_at = self._ask(), self._now()
            return False
        return self._now() - self._asked_at > self._limit_s
