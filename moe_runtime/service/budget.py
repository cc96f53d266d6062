"""Bounds what waits in a router's queue."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from moe_runtime.errors import OverloadedError

if TYPE_CHECKING:
    from moe_runtime.service.ports import Clock


class QueueBudget:
    """How many tokens and bytes may wait. Thread-safe.

    Args:
        max_tokens: Tokens that may wait at once.
        max_bytes: Bytes that may wait at once.
        clock: Tells the time, for the hint when to retry.
    """

    def __init__(self, *, max_tokens: int, max_bytes: int, clock: Clock) -> None:
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._opened_at = clock.now()
        self._tokens_out = 0
        self.num_tokens = 0
        self.num_bytes = 0

    def resize(self, *, max_tokens: int, max_bytes: int) -> None:
        """Other limits from now on; what waits already may exceed them."""
        with self._lock:
            self._max_tokens, self._max_bytes = max_tokens, max_bytes

    def reserve(self, num_tokens: int, num_bytes: int) -> None:
        """Take a place in the queue.

        Raises:
            OverloadedError: If the queue is full; says when it is worth trying again.
        """
        with self._lock:
            if self.num_tokens + num_tokens > self._max_tokens:
                raise self._full("tokens", self.num_tokens, num_tokens, self._max_tokens)
            if self.num_bytes + num_bytes > self._max_bytes:
                raise self._full("bytes", self.num_bytes, num_bytes, self._max_bytes)
            self.num_tokens += num_tokens
            self.num_bytes += num_bytes

    def release(self, num_tokens: int, num_bytes: int) -> None:
        """Give a place back."""
        with self._lock:
            self.num_tokens -= num_tokens
            self.num_bytes -= num_bytes
            self._tokens_out += num_tokens

    def _full(self, unit: str, queued: int, more: int, most: int) -> OverloadedError:
        tokens_per_s = self._tokens_out / max(self._clock.now() - self._opened_at, 1e-3)
        wait_s = self.num_tokens / tokens_per_s if tokens_per_s > 0 else 0.1
        retry_after_ms = min(max(wait_s * 1000.0, 1.0), 5000.0)
        return OverloadedError(
            f"the router's queue is full: {queued} {unit} wait, {more} more would exceed {most}; "
            f"try again in {retry_after_ms:.0f} ms",
            retry_after_ms=retry_after_ms,
        )
