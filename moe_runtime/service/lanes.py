"""Who may travel now of those that travel alone: one at a time to a host, and one at a time of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable


class _Wish(NamedTuple):
    ticket: int
    host: int
    request: Hashable


class SuspectLanes:
    """Keeps messages apart of which a host may die, so that it is known of which one it did. Owned by one thread."""

    def __init__(self) -> None:
        self._hosts: dict[int, int] = {}
        self._requests: dict[Hashable, int] = {}
        self._waiting: list[_Wish] = []

    def enter(self, ticket: int, *, host: int, request: Hashable) -> bool:
        """Whether a message may be sent now; otherwise it waits until ``leave`` or ``host_lost`` names it.

        Args:
            ticket: The message's.
            host: Incarnation of the host that it goes to.
            request: The request that it carries.
        """
        wish = _Wish(ticket, host, request)
        if self._is_free(wish):
            self._take(wish)
            return True
        self._waiting.append(wish)
        return False

    def leave(self, ticket: int, *, host_is_done: bool = True) -> list[int]:
        """A message has ended, or waits no longer.

        Args:
            ticket: The message's.
            host_is_done: Whether its host has answered it; until it does, none other may go there.

        Returns:
            The messages that may be sent now.
        """
        self._waiting = [wish for wish in self._waiting if wish.ticket != ticket]
        self._requests = {key: taken_by for key, taken_by in self._requests.items() if taken_by != ticket}
        if host_is_done:
            self._hosts = {key: taken_by for key, taken_by in self._hosts.items() if taken_by != ticket}
        return self._next()

    def host_lost(self, host: int) -> list[int]:
        """A host has gone, and with it whatever it had; the messages that may be sent now."""
        ticket = self._hosts.pop(host, None)
        self._waiting = [wish for wish in self._waiting if wish.host != host]
        return [] if ticket is None else self.leave(ticket)

    def _next(self) -> list[int]:
        free = []
        for wish in self._waiting:
            if self._is_free(wish):
                self._take(wish)
                free.append(wish.ticket)
        self._waiting = [wish for wish in self._waiting if wish.ticket not in free]
        return free

    def _is_free(self, wish: _Wish) -> bool:
        return wish.host not in self._hosts and wish.request not in self._requests

    def _take(self, wish: _Wish) -> None:
        self._hosts[wish.host] = self._requests[wish.request] = wish.ticket
