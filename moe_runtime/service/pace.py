"""How fast a layer works off what waits for it, and for whom, measured lately."""

from __future__ import annotations

import math
from collections import Counter

#: Seconds of work after which a measurement counts for a third of what it did.
_MEMORY_S = 1.0
#: Who was served is counted over between one and two of these.
_WINDOW_S = 0.5


class Pace:
    """Tokens per second that a layer answers while it has more to do than it can take. Owned by one thread.

    Only batches that left rows waiting behind them tell what a layer can do; of the others, which may be small
    because nobody asked for more, one that was faster than that counts. So a layer that recovers is believed at
    once, and one that nobody uses is not taken for slow. Nothing is known before the first batch that left rows
    behind. The numbers may be read from any thread.

    Attributes:
        tokens_per_s: Weighted mean over about the last second of work; None while it is unknown.
        batch_s: Weighted mean of the time from a batch's departure to its answer, of every batch, the quick ones
            believed sooner: an estimate that keeps requests away must not outlive its cause.
        batch_tokens: Weighted mean of the tokens of the batches that left rows waiting.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.batch_s = 0.0
        self.batch_tokens = 1.0
        self._tokens = 0.0
        self._work_s = 0.0
        self._last_answer_at = -math.inf

    def batch_answered(self, num_tokens: int, *, joined_at: float, now: float, left_rows_waiting: bool) -> None:
        """A batch that left the queue at ``joined_at`` has returned."""
        # Batches overlap: this one has the time since the one before it for itself.
        work_s = max(0.0, now - max(joined_at, self._last_answer_at))
        self._last_answer_at = now
        kept = math.exp(-work_s / _MEMORY_S)
        tokens, seconds = self._tokens * kept + num_tokens, self._work_s * kept + work_s
        if seconds <= 0:
            return
        is_faster = self.tokens_per_s is not None and tokens / seconds > self.tokens_per_s
        took_s = now - joined_at
        old = min(kept, 0.5) if took_s < self.batch_s else kept
        self.batch_s = took_s if self.batch_s == 0.0 else self.batch_s * old + took_s * (1.0 - old)
        if left_rows_waiting:
            is_first = self.tokens_per_s is None
            self.batch_tokens = num_tokens if is_first else self.batch_tokens * kept + num_tokens * (1.0 - kept)
        if left_rows_waiting or is_faster:
            self._tokens, self._work_s, self.tokens_per_s = tokens, seconds, tokens / seconds

    def seconds_for(self, num_tokens: float) -> float:
        """How long so many tokens take to be worked off; 0 while the pace is unknown."""
        return 0.0 if self.tokens_per_s is None else num_tokens / self.tokens_per_s


class ServedLately:
    """Which part of a layer's tokens were whose, over about the last second. Not thread-safe."""

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()
        self._lately: Counter[str] = Counter()
        self._since = -math.inf

    def add(self, client: str, num_tokens: int, *, now: float) -> None:
        """So many tokens of a client have left the queue for the experts."""
        self._turn_over(now)
        self._lately[client] += num_tokens

    def share(self, client: str, *, now: float) -> float:
        """The client's part of all tokens; 0 where there were none."""
        self._turn_over(now)
        num_tokens = self._before.total() + self._lately.total()
        return (self._before[client] + self._lately[client]) / num_tokens if num_tokens else 0.0

    def num_clients(self, *, now: float) -> int:
        """How many clients those tokens were of."""
        self._turn_over(now)
        return len(self._before) + len(self._lately.keys() - self._before.keys())

    def _turn_over(self, now: float) -> None:
        passed_s = now - self._since
        if passed_s < _WINDOW_S:
            return
        self._before = self._lately if passed_s < 2 * _WINDOW_S else Counter()
        self._lately = Counter()
        self._since = now
