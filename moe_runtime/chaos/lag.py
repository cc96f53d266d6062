"""How late this process runs what is due: the noise in what its clients measure."""

from __future__ import annotations

import asyncio
import threading
import time

TICK_S = 0.01
#: That are kept: more than a minute's.
_MAX_TICKS = 20_000


class LagMeter:
    """How late a thread runs what is due every ``TICK_S``.

    Attributes:
        worst_s: The longest time for which it did not run, so far.
    """

    def __init__(self, now: float | None = None) -> None:
        """Begin with no lag, at a time by ``time.monotonic``; at the present one when None."""
        self._ticks: list[tuple[float, float]] = [(time.monotonic() if now is None else now, 0.0)]
        self.worst_s = 0.0

    def add(self, now: float, lag_s: float) -> None:
        """The thread runs, and is so late."""
        self.worst_s = max(self.worst_s, lag_s)
        self._ticks.append((now, lag_s))
        if len(self._ticks) > _MAX_TICKS:
            del self._ticks[: _MAX_TICKS // 2]

    def since(self, moment: float, now: float) -> float:
        """For how long in all it did not run when something was due, from a moment of the last minute to now."""
        # Of its own: the thread goes on meanwhile.
        ticks = self._ticks.copy()
        latest, _ = ticks[-1]
        # Overdue at this moment: whoever asks runs before the meter does.
        total_s = max(0.0, now - max(moment, latest + TICK_S))
        for at, lag_s in reversed(ticks):
            if at <= moment:
                break
            total_s += min(lag_s, at - moment)
        return total_s


class Lag:
    """The lag of the event loop, and of a thread beside it: as gRPC's are, which every answer has to pass."""

    def __init__(self) -> None:
        """Begin with no lag."""
        self._loop, self._thread = LagMeter(), LagMeter()
        self._stopping = threading.Event()

    @property
    def worst_s(self) -> float:
        """The longest time for which either did not run."""
        return max(self._loop.worst_s, self._thread.worst_s)

    def since(self, moment: float, now: float) -> float:
        """For how long in all, both together, they did not run from a moment of the last minute to now."""
        return self._loop.since(moment, now) + self._thread.since(moment, now)

    async def run(self) -> None:
        """Measure until cancelled."""
        self._stopping.clear()
        thread = threading.Thread(target=self._tick, name="chaos-lag", daemon=True)
        thread.start()
        try:
            self._loop.add(time.monotonic(), 0.0)
            while True:
                due_at = time.monotonic() + TICK_S
                await asyncio.sleep(TICK_S)
                now = time.monotonic()
                self._loop.add(now, now - due_at)
        finally:
            self._stopping.set()
            thread.join()

    def _tick(self) -> None:
        self._thread.add(time.monotonic(), 0.0)
        due_at = time.monotonic() + TICK_S
        while not self._stopping.wait(TICK_S):
            now = time.monotonic()
            self._thread.add(now, now - due_at)
            due_at = now + TICK_S
