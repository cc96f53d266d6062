"""Circuit breakers: what did not answer is left alone for a while, longer each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from moe_runtime.service.ports import Clock

#: How long the first time, and at most.
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 8.0
#: How long the first time where an answer is late: whoever still works on it will answer, which closes the breaker, and
#: each probe may cost a request its time.
LATE_BACKOFF_S = 4.0


@dataclass(slots=True)
class _Breaker:
    """An open one."""

    opened_at: float
    backoff_s: float
    is_probed: bool = False


class Breakers:
    """One breaker per key, closed until something fails. Owned by one thread.

    An open breaker lets nothing through until its backoff is over; then it lets one probe through, and closes or opens
    anew by how that ends.

    Args:
        clock: Tells the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[Hashable, _Breaker] = {}

    @property
    def any_open(self) -> bool:
        """Whether there is anything to ask about."""
        return bool(self._open)

    def lets_through(self, key: Hashable) -> bool:
        """Whether a message may go there now."""
        breaker = self._open.get(key)
        if breaker is None:
            return True
        return not breaker.is_probed and breaker.opened_at + breaker.backoff_s <= self._clock.now()

    def probe(self, key: Hashable) -> None:
        """Note that a message is on its way there."""
        breaker = self._open.get(key)
        if breaker is not None:
            breaker.is_probed = True

    def probe_ended(self, key: Hashable) -> None:
        """Note that nothing is on its way there any more."""
        breaker = self._open.get(key)
        if breaker is not None:
            breaker.is_probed = False

    def failed(self, key: Hashable, *, sent_at: float, first_backoff_s: float = FIRST_BACKOFF_S) -> None:
        """Open the breaker, because of a message; one that was sent before it opened says nothing new."""
        breaker = self._open.get(key)
        if breaker is None:
            self._open[key] = _Breaker(self._clock.now(), first_backoff_s)
        elif sent_at >= breaker.opened_at:
            self._open[key] = _Breaker(self._clock.now(), min(2.0 * breaker.backoff_s, LONGEST_BACKOFF_S))

    def answered(self, key: Hashable) -> None:
        """Close the breaker."""
        self._open.pop(key, None)

    def forget(self, is_gone: Callable[[Hashable], bool]) -> None:
        """Forget the keys that are gone for good."""
        for key in [key for key in self._open if is_gone(key)]:
            del self._open[key]
