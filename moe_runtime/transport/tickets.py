"""The tickets whose replies one connection still expects, so that each is delivered at most once."""

from __future__ import annotations

MAX_OUTSTANDING = 1 << 16


class OutstandingTickets:
    """Tickets sent and not answered, and how many bytes of rows they hold at the host.

    A reply need not come, so the oldest ticket is forgotten when there are ``max_outstanding``.
    """

    def __init__(self, max_outstanding: int = MAX_OUTSTANDING) -> None:
        self._max_outstanding = max_outstanding
        # A dict keeps the order of insertion: its first key is the oldest ticket.
        self._num_bytes: dict[int, int] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._num_bytes)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._num_bytes

    def add(self, ticket: int, num_bytes: int = 0) -> None:
        """Expect a reply to this ticket."""
        if len(self._num_bytes) >= self._max_outstanding:
            self.take(next(iter(self._num_bytes)))
        self._num_bytes[ticket] = num_bytes
        self.num_bytes += num_bytes

    def take(self, ticket: int) -> bool:
        """Whether a reply to this ticket is expected; it no longer is afterwards."""
        num_bytes = self._num_bytes.pop(ticket, None)
        if num_bytes is None:
            return False
        self.num_bytes -= num_bytes
        return True
