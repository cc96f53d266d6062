"""Where callers' threads meet the service's thread: what it is to do, how many requests it holds, whether it drains."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from moe_runtime.errors import OverloadedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.service.queue_stats import QueueStats
    from moe_runtime.service.shares import ClientShares

_LOG = logging.getLogger(__name__)


class _OpenOnLevel:
    """The open requests for layers of one level of nesting: how many, and whose."""

    def __init__(self, shares: ClientShares) -> None:
        self.shares = shares
        self.num_open = 0


class Inbox:
    """Actions for the service's thread, in the order of their coming. Thread-safe but for ``run_all``.

    Args:
        wake: Makes the service's thread look here; called once for all actions that it has not seen yet.
        max_open_requests: Requests that may be open at once, on each level of nesting.
        shares: What each client may hold of them, and holds.
        stats: Counts what is refused.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        *,
        max_open_requests: int,
        shares: ClientShares,
        stats: QueueStats,
    ) -> None:
        self._wake = wake
        self._max_open_requests = max_open_requests
        self._levels = {0: _OpenOnLevel(shares)}
        self._stats = stats
        self._actions: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_shut = False

    @property
    def num_open(self) -> int:
        """Requests that were taken in and not answered yet."""
        return sum(level.num_open for level in self._levels.values())

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._is_closed

    def take_in(
        self,
        action: Callable[[], None],
        *,
        client: str,
        reserve: Callable[[], None],
        hint_ms: Callable[[], float],
        level: int = 0,
    ) -> None:
        """Count a request as open, and have the service's thread queue it.

        Args:
            action: Queues it.
            client: Who asks.
            reserve: Takes its place in the queue's budget, or raises.
            hint_ms: Says when it is worth trying again, in milliseconds.
            level: Of its layer.

        Raises:
            UnavailableError: If no new requests are taken.
            OverloadedError: If too many are open, or the budget is spent.
        """
        with self._changed:
            if self._is_closed and not self._is_waited_for(level):
                self._stats.refuse("draining")
                raise UnavailableError("the router is shutting down; send the request to another one")
            opened = self._on_level(level)
            self._check_room(opened, client, hint_ms)
            reserve()
            opened.num_open += 1
            opened.shares.take(client, 1)
            # Under the lock: a service that shuts down sees every request that it has taken in.
            self._actions.append(action)
        self._wake_once()

    def post(self, action: Callable[[], None]) -> None:
        """Have the service's thread do something."""
        self._actions.append(action)
        self._wake_once()

    def run_all(self) -> None:
        """Do everything that was posted so far, in the service's thread."""
        # Before the first is taken: what comes from now on wakes the thread again.
        self._is_woken = False
        while self._actions:
            self._actions.popleft()()

    def run_rest(self) -> None:
        """Do everything that was posted even where some of it raises, in the service's thread."""
        while self._actions:
            try:
                self._actions.popleft()()
            except Exception:
                # Whatever stopped the engine may stand here again; the requests behind it need their answers.
                _LOG.exception("the router could not finish an action while it was shutting down")

    def answered(self, client: str, level: int = 0) -> None:
        """One of a client's open requests has its answer."""
        with self._changed:
            opened = self._levels[level]
            opened.num_open -= 1
            opened.shares.take(client, -1)
            if not self.num_open:
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new requests from now on, but for those that open ones may be waiting for."""
        with self._changed:
            self._is_closed = True

    def shut(self) -> None:
        """Refuse whatever comes from now on."""
        with self._changed:
            self._is_closed = self._is_shut = True

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until no request is open; True if that happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_open == 0, timeout_s)

    def _on_level(self, level: int) -> _OpenOnLevel:
        opened = self._levels.get(level)
        if opened is None:
            opened = _OpenOnLevel(self._levels[0].shares.anew())
            # A new dictionary: `num_open` reads the old one without the lock.
            self._levels = {**self._levels, level: opened}
        return opened

    def _is_waited_for(self, level: int) -> bool:
        """Whether an open request for a layer further out may have asked for one of this level."""
        return not self._is_shut and any(opened.num_open for outer, opened in self._levels.items() if outer < level)

    def _check_room(self, opened: _OpenOnLevel, client: str, hint_ms: Callable[[], float]) -> None:
        most = self._max_open_requests
        within_share = opened.shares.may_take(client, 1, whole=most)
        if opened.num_open >= most:
            self._stats.refuse("open_requests")
            raise OverloadedError(f"the router holds {most} requests, its limit; try again", hint_ms())
        if not within_share:
            self._stats.refuse("client_share")
            held = opened.shares.held(client)
            raise OverloadedError(
                f"the client has {held} requests open of the {most} that the router holds at most, "
                f"and may have {opened.shares.share:g} of them while others want some; try again",
                hint_ms(),
            )

    def _wake_once(self) -> None:
        # After the action was added, and reset before any is taken: so none is left without its wake-up.
        if not self._is_woken:
            self._is_woken = True
            self._wake()
