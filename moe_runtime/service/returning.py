"""Who is about to be back: callers that were answered just now and tend to send their next request at once."""

from __future__ import annotations

#: How long the next of them may take, as a share of the time that their batch took.
_GAP_SHARE = 0.5
#: Nobody waits for them longer than so many times ``max_wait_ms``, however slow the experts are.
_MAX_WAITS = 50.0


class ReturningCallers:
    """Says how long a request should wait for the callers that were answered together a moment ago.

    Callers in a loop come back one after the other. If the first of them went to the experts alone, the others
    would share the next batch, and a batch that is half as large costs more than half as much. So the first waits
    for the others: until as many requests have come as were answered, until the next takes longer than half of the
    time that the last batch took (``max_wait_ms`` at least), or until it has waited for as long as that batch took.
    A caller that is alone never waits, and with a ``max_wait_ms`` of 0 nobody does.

    Args:
        max_wait_s: The router's ``max_wait_ms``, in seconds.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._num_missing = 0
        self._gap_s = 0.0
        self._longest_s = 0.0
        self._missing_until = float("-inf")

    def answered(self, num_requests: int, *, took_s: float, now: float) -> None:
        """So many requests were answered by one batch, which took so long."""
        self._num_missing = self._still_missing(now) + num_requests
        # However long ``max_wait_ms`` is, an idle layer makes nobody wait longer than a batch of their own would.
        self._longest_s = min(took_s, _MAX_WAITS * self._max_wait_s)
        self._gap_s = min(self._longest_s, max(self._max_wait_s, _GAP_SHARE * took_s))
        self._missing_until = now + self._gap_s

    def arrived(self, now: float) -> None:
        """A request has come."""
        self._num_missing = max(0, self._still_missing(now) - 1)
        self._missing_until = now + self._gap_s

    def wait_until(self, oldest_arrived_at: float, now: float) -> float | None:
        """Clock time until which a request that came then should wait; None where nobody else is missing."""
        if not self._still_missing(now):
            return None
        return min(self._missing_until, oldest_arrived_at + self._longest_s)

    def _still_missing(self, now: float) -> int:
        return self._num_missing if now < self._missing_until else 0
