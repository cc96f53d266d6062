"""What waits for one layer: a line per client, served in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.service.requests import LayerRequest

#: A client's turn is this part of a batch: small enough that many share one, and most requests stay whole.
_TURNS_PER_BATCH = 8


def turn_tokens(max_batch_tokens: int) -> int:
    """Tokens that a client may send to the experts before it is the next one's turn."""
    return max(1, max_batch_tokens // _TURNS_PER_BATCH)


@dataclass
class QueuedRequest:
    """A request in the queue, how many of its rows have left it, and the level that it was taken in on."""

    request_key: int
    request: LayerRequest
    arrived_at: float
    next_row: int = 0
    level: int = 0

    @property
    def num_rows_left(self) -> int:
        """Rows that are still waiting."""
        return int(self.request.tokens.shape[0]) - self.next_row


@dataclass(eq=False)
class _Line:
    """One client's requests, in the order of their coming, and the rows that it may send before others do."""

    client: str
    requests: OrderedDict[int, QueuedRequest] = field(default_factory=OrderedDict)
    credit: int = 0

    @property
    def first(self) -> QueuedRequest:
        return next(iter(self.requests.values()))


class FairQueue:
    """Requests that wait, first in first out within a client, and the clients in turn. Owned by one thread.

    Deficit round robin (https://doi.org/10.1145/217391.217453) in rows: a client's turn adds to its credit, and it
    sends what its credit covers. So clients that always have something waiting get equal numbers of rows, however
    many they ask for, and requests are not torn apart for it. A lone client's requests leave as they came.

    Args:
        turn_tokens: Rows that a turn adds to a client's credit.
    """

    def __init__(self, turn_tokens: int) -> None:
        self._turn_tokens = turn_tokens
        self._by_age: OrderedDict[int, QueuedRequest] = OrderedDict()
        self._lines: deque[_Line] = deque()
        self._by_client: dict[str, _Line] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def oldest(self) -> QueuedRequest:
        """The request that has waited longest; only where there is one."""
        return next(iter(self._by_age.values()))

    def add(self, queued: QueuedRequest) -> None:
        """Put a request at the end of its client's line."""
        client = queued.request.client
        line = self._by_client.get(client)
        if line is None:
            line = self._by_client[client] = _Line(client)
            self._lines.append(line)
        line.requests[queued.request_key] = queued
        self._by_age[queued.request_key] = queued
        self.num_tokens += queued.num_rows_left

    def remove(self, request_key: int) -> QueuedRequest | None:
        """Take a request out, wherever it stands; None if it does not wait."""
        queued = self._by_age.pop(request_key, None)
        if queued is not None:
            self.num_tokens -= queued.num_rows_left
            self._leave_line(queued)
        return queued

    def next(self, space: int) -> QueuedRequest:
        """The request to send rows of into a batch that has room for ``space`` rows; only where one waits."""
        lines = self._lines
        while len(lines) > 1 and lines[0].credit < min(lines[0].first.num_rows_left, space):
            lines.rotate(-1)
            lines[0].credit += self._turn_tokens
        return lines[0].first

    def sent(self, queued: QueuedRequest, num_rows: int) -> None:
        """So many rows of the request that is ``next`` go; it leaves with its last."""
        queued.next_row += num_rows
        self.num_tokens -= num_rows
        if len(self._lines) > 1:
            self._lines[0].credit -= num_rows
        if queued.num_rows_left == 0:
            del self._by_age[queued.request_key]
            self._leave_line(queued)

    def _leave_line(self, queued: QueuedRequest) -> None:
        line = self._by_client[queued.request.client]
        del line.requests[queued.request_key]
        if not line.requests:
            # Its credit goes with it: nobody saves up by asking rarely.
            del self._by_client[line.client]
            self._lines.remove(line)
