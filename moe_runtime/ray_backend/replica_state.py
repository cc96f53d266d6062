"""The life of a replica as one pure state machine: ``starting -> ready -> suspect -> out(reason, retry_at)``.

Crash loops, quarantine and slow starts all go through it: whatever fails goes ``out`` and starts again at its
time, which is exponentially later with every failure in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_runtime.errors import InternalError
from moe_runtime.service.routing_table import ReplicaState

_ALLOWED = {
    ReplicaState.STARTING: {ReplicaState.READY, ReplicaState.OUT},
    ReplicaState.READY: {ReplicaState.SUSPECT, ReplicaState.OUT},
    ReplicaState.SUSPECT: {ReplicaState.READY, ReplicaState.OUT},
    ReplicaState.OUT: {ReplicaState.STARTING},
}


@dataclass(frozen=True)
class Backoff:
    """How long a replica stays out.

    Attributes:
        first_s: After its first failure.
        factor: How much longer after each further failure in a row.
        max_s: At most.
        stable_s: A replica that served for so long has its earlier failures forgiven.
    """

    first_s: float = 0.2
    factor: float = 2.0
    max_s: float = 30.0
    stable_s: float = 60.0

    def delay_s(self, num_failures: int) -> float:
        """Time out after the given number of failures in a row, at least one."""
        # Bounded exponent: a float overflows after about a thousand doublings.
        return min(self.max_s, self.first_s * self.factor ** min(num_failures - 1, 64))


@dataclass(frozen=True)
class ReplicaLife:
    """Where a replica stands in its life; every transition returns a new value.

    Attributes:
        state: The state.
        since: Clock time at which it was entered.
        num_failures: Failures in a row.
        ready_since: Clock time of the last ``starting -> ready``, or None while it never was or is out.
        reason: Why it is suspect or out; while it starts again, why it was out.
        retry_at: When it may start again; None unless it is out.
    """

    state: ReplicaState
    since: float
    num_failures: int = 0
    ready_since: float | None = None
    reason: str | None = None
    retry_at: float | None = None

    @classmethod
    def begin(cls, now: float) -> ReplicaLife:
        """A replica that starts for the first time."""
        return cls(ReplicaState.STARTING, now)

    def become_ready(self, now: float) -> ReplicaLife:
        """It started, or a suspect answered again.

        Raises:
            InternalError: If it is neither starting nor suspect.
        """
        since = self.ready_since if self.state is ReplicaState.SUSPECT else now
        return replace(self._enter(ReplicaState.READY, now), ready_since=since)

    def become_suspect(self, now: float, reason: str) -> ReplicaLife:
        """Something is wrong with it, and may pass; one that is suspect already is so for this reason now.

        Raises:
            InternalError: If it is neither ready nor suspect.
        """
        if self.state is ReplicaState.SUSPECT:
            return replace(self, reason=reason)
        return replace(self._enter(ReplicaState.SUSPECT, now), reason=reason)

    def go_out(self, now: float, reason: str, backoff: Backoff) -> ReplicaLife:
        """It failed: it is sent nothing, and may start again at ``retry_at``.

        Raises:
            InternalError: If it is out already.
        """
        stable = self.ready_since is not None and now - self.ready_since >= backoff.stable_s
        num_failures = 1 if stable else self.num_failures + 1
        return replace(
            self._enter(ReplicaState.OUT, now),
            num_failures=num_failures,
            ready_since=None,
            reason=reason,
            retry_at=now + backoff.delay_s(num_failures),
        )

    def start_again(self, now: float) -> ReplicaLife:
        """Its time has come.

        Raises:
            InternalError: If it is not out, or not yet.
        """
        if self.retry_at is not None and now < self.retry_at:
            raise InternalError(f"replica state: may start again at {self.retry_at}, it is {now}")
        return replace(self._enter(ReplicaState.STARTING, now), reason=self.reason)

    def _enter(self, state: ReplicaState, now: float) -> ReplicaLife:
        if state not in _ALLOWED[self.state]:
            raise InternalError(f"replica state: {self.state} is never followed by {state}")
        return replace(self, state=state, since=now, reason=None, retry_at=None)
