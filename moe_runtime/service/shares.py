"""Keeps one client from taking all of what several ask for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.service.ports import Clock

#: A client that asked for something within so many seconds is active, whether it got it or not.
ACTIVE_S = 2.0
#: Clients that hold nothing are remembered up to this number: names come from outside.
_MOST_IDLE_CLIENTS = 4096
#: Bounds the work of one question where many hold something and are silent.
_MOST_KEPT_AT_ONCE = 4


@dataclass
class _Client:
    held: int = 0
    asked_at: float = 0.0


class ClientShares:
    """What each client holds of one limited thing, and whether it may hold more. Not thread-safe.

    A client that is alone may hold all of it. While another is active, one may hold only its share; what it holds
    beyond that it keeps. A client that holds nothing may always take one amount, however large.

    Args:
        share: Of the whole, what one client may hold while others are active; above 0, at most 1.
        clock: Tells the time.
    """

    def __init__(self, *, share: float, clock: Clock) -> None:
        self.share = share
        self._clock = clock
        # In the order of asking: whoever asked last is at the end.
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def anew(self) -> ClientShares:
        """The same rules for another thing, of which nobody holds anything."""
        return ClientShares(share=self.share, clock=self._clock)

    @property
    def num_active(self) -> int:
        """Clients that hold something, or asked for something lately."""
        return len(self._clients)

    def held(self, client: str) -> int:
        """What a client holds."""
        known = self._clients.get(client)
        return 0 if known is None else known.held

    def may_take(self, client: str, amount: int, *, whole: int) -> bool:
        """Whether a client may hold so much more of the whole; by asking it becomes active."""
        now = self._clock.now()
        known = self._clients.setdefault(client, _Client())
        known.asked_at = now
        self._clients.move_to_end(client)
        self._forget(now)
        if known.held == 0 or len(self._clients) == 1:
            return True
        return known.held + amount <= self.share * whole

    def take(self, client: str, amount: int) -> None:
        """A client holds so much more, or less where the amount is negative."""
        self._clients.setdefault(client, _Client(asked_at=self._clock.now())).held += amount

    def _forget(self, now: float) -> None:
        """Drop clients that hold nothing and have been silent, the longest silent first."""
        num_kept = 0
        while len(self._clients) > 1 and num_kept < _MOST_KEPT_AT_ONCE:
            name, oldest = next(iter(self._clients.items()))
            is_silent = oldest.asked_at + ACTIVE_S <= now
            if not is_silent and len(self._clients) <= _MOST_IDLE_CLIENTS:
                return
            if oldest.held:
                # It is active for as long as something of it waits.
                num_kept += 1
                oldest.asked_at = now
                self._clients.move_to_end(name)
            else:
                del self._clients[name]
