"""Until when somebody waits for the forward that is under way: for experts that ask somebody else."""

from __future__ import annotations

import time
from contextvars import ContextVar

_GIVEN_UP_AT: ContextVar[float | None] = ContextVar("given_up_at", default=None)


def answer_within(seconds: float) -> None:
    """Note in a host's thread that the answers of its next forwards are awaited for so long, from now on."""
    _GIVEN_UP_AT.set(time.monotonic() + seconds)


def time_left_s() -> float | None:
    """Seconds for which the answer of the present forward is still awaited; None where nobody has said."""
    given_up_at = _GIVEN_UP_AT.get()
    return None if given_up_at is None else given_up_at - time.monotonic()
