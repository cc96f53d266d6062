"""How often and when a client tries again."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


@dataclass(frozen=True)
class RetryPolicy:
    """When a client tries a call again, and how much it may add to the load by doing so.

    Attributes:
        max_attempts: Attempts of one call, the first included; 1 never retries.
        first_backoff_s: Pause before the first retry; it doubles with each further one.
        max_backoff_s: Longest pause.
        budget: Retries that all calls of the client together may make beyond those earned; going on to another
            router that is in no trouble costs none.
        earned_per_success: What each successful call adds to the budget, up to where it began.
    """

    max_attempts: int = 6
    first_backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    budget: float = 100.0
    earned_per_success: float = 0.1

    def backoff_s(self, num_retries: int, rng: random.Random) -> float:
        """Pause before a retry, jittered to between a half and the whole of it.

        Args:
            num_retries: Retries of the call so far.
            rng: Draws the jitter.
        """
        longest_s: float = min(self.first_backoff_s * 2.0**num_retries, self.max_backoff_s)
        return longest_s * (0.5 + 0.5 * rng.random())


DEFAULT_RETRY_POLICY = RetryPolicy()


class RetryBudget:
    """Bounds the retries of all calls of a client, so that they cannot finish off a router in trouble. Thread-safe."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._left = policy.budget

    def spend(self) -> bool:
        """Take one retry out of the budget; False if there is none left."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def earn(self) -> None:
        """A call succeeded."""
        with self._lock:
            self._left = min(self._left + self._policy.earned_per_success, self._policy.budget)
