"""The tickets whose replies one connection still expects, so that each is delivered at most once."""

from __future__ import annotations

MAX_OUTSTANDING = 1 << 16


class OutstandingTickets:
    """Tickets sent and not answered.

    A reply need not come, so the oldest ticket is forgotten when there are ``max_outstanding``.
    """

    def __init__(self, max_outstanding: int = MAX_OUTSTANDING) -> None:
        self._max_outstanding = max_outstanding
        # A dict keeps the order of insertion: its first key is the oldest ticket.
        self._tickets: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: int) -> None:
        """Expect a reply to this ticket."""
        if len(self._tickets) >= self._max_outstanding:
            del self._tickets[next(iter(self._tickets))]
        self._tickets[ticket] = None

    def take(self, ticket: int) -> bool:
        """Whether a reply to this ticket is expected; it no longer is afterwards."""
        if ticket not in self._tickets:
            return False
        del self._tickets[ticket]
        return True
