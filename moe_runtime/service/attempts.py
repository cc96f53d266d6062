"""The messages on their way: each is an attempt to have rows of a batch served, and ends in time or out of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import TransportError
from moe_runtime.service.lanes import SuspectLanes
from moe_runtime.service.ports import HostRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_runtime.service.dispatch import HostMessage
    from moe_runtime.service.flight import Flight
    from moe_runtime.service.ports import Clock, Endpoint, Transport
    from moe_runtime.service.replica_choice import ReplicaChoice
    from moe_runtime.service.stats import RouterStats

#: Messages that were given up, and of which it is remembered whom they were sent to.
_MAX_OVERDUE = 4096


@dataclass(slots=True, eq=False)
class Attempt:
    """A message that its host has not answered, and is still waited for.

    Attributes:
        flight: The batch.
        message: What it carries.
        sent_at: Clock time when it was sent, or was made if it waits for its turn.
        deadline: Clock time when it is given up.
        hedge_at: Clock time when a second replica is asked, too.
        waiting: The request, while it waits for its turn; then None.
        has_begun: Whether its host has said that the rows are with the experts, which it does where they travel alone.
    """

    flight: Flight
    message: HostMessage
    sent_at: float
    deadline: float
    hedge_at: float = math.inf
    waiting: HostRequest | None = None
    has_begun: bool = False


class Attempts:
    """Sends messages and waits for their answers. Owned by one thread.

    A message that carries a request alone waits until no other such message is with its host, and none of its request
    anywhere.

    Args:
        transport: Carries them.
        choice: Is told how they fare.
        stats: Counts them.
        clock: Tells the time.
    """

    def __init__(self, transport: Transport, *, choice: ReplicaChoice, stats: RouterStats, clock: Clock) -> None:
        self._transport = transport
        self._choice = choice
        self._stats = stats
        self._clock = clock
        self._tickets = itertools.count(1)
        self._open: dict[int, Attempt] = {}
        self._overdue: dict[int, HostMessage] = {}
        self._lanes = SuspectLanes()
        self._next_due = math.inf
        self._turns: list[int] = []

    @property
    def has_turns(self) -> bool:
        """Whether ``start_waiting`` has something to do."""
        return bool(self._turns)

    @property
    def next_due(self) -> float:
        """Clock time before which no attempt is given up, or hedged."""
        return self._next_due

    def endpoints(self) -> set[Endpoint]:
        """Where answers are expected from."""
        return {attempt.message.endpoint for attempt in self._open.values()}

    def send(self, attempt: Attempt, rows: Tensor) -> str | None:
        """Send the rows of a message, now or when its turn comes; None, or why it cannot be sent."""
        ticket, message = next(self._tickets), attempt.message
        batch = attempt.flight.batch
        request_ids = (
            batch.request_ids if message.alone is None else batch.request_ids[message.alone : message.alone + 1]
        )
        # Less than the attempt gets where nobody waits for so long: the replica is not to blame for that.
        timeout_s = max(0.0, min(attempt.deadline, batch.awaited_until) - attempt.sent_at)
        is_suspect = message.alone is not None
        request = HostRequest(ticket, message.wire_segments(), rows, timeout_s, request_ids, is_suspect)
        if is_suspect and not self._may_go(ticket, attempt):
            attempt.waiting = request
        else:
            reason = self._hand_over(ticket, message, request)
            if reason is not None:
                return reason
        self._open[ticket] = attempt
        self._choice.sent(message)
        self._next_due = min(self._next_due, attempt.deadline, attempt.hedge_at)
        return None

    def note_begun(self, ticket: int) -> None:
        """A host has begun with the rows of a message."""
        attempt = self._open.get(ticket)
        if attempt is not None:
            attempt.has_begun = True

    def take_answered(self, ticket: int) -> Attempt | None:
        """The attempt that a host has answered; None if it was given up."""
        attempt = self._open.pop(ticket, None)
        if attempt is None:
            self._stats.num_late_replies += 1
            message = self._overdue.pop(ticket, None)
        else:
            message = attempt.message
            self._choice.ended(message)
        if message is not None:
            self._choice.answered(message)
            if message.alone is not None:
                self._turns += self._lanes.leave(ticket)
        return attempt

    def take_lost(self, endpoint: Endpoint) -> list[Attempt]:
        """Give up what a host had and will not answer, and what was to be sent to it."""
        self._overdue = {key: message for key, message in self._overdue.items() if message.endpoint != endpoint}
        lost = self._take(lambda attempt: attempt.message.endpoint == endpoint)
        self._choice.host_lost(endpoint)
        self._turns += self._lanes.host_lost(endpoint.incarnation)
        return list(lost.values())

    def take_overdue(self, now: float) -> list[Attempt]:
        """Give up what was not answered in time."""
        late = self._take(lambda attempt: attempt.deadline <= now)
        for ticket, attempt in late.items():
            if attempt.waiting is None:
                self._overdue[ticket] = attempt.message
                self._choice.timed_out(attempt.message, sent_at=attempt.sent_at)
            if attempt.message.alone is not None:
                self._turns += self._lanes.leave(ticket, host_is_done=attempt.waiting is not None)
        while len(self._overdue) > _MAX_OVERDUE:
            oldest = next(iter(self._overdue))
            del self._overdue[oldest]
            self._turns += self._lanes.leave(oldest)
        self._next_due = min([min(each.deadline, each.hedge_at) for each in self._open.values()], default=math.inf)
        return list(late.values())

    def start_waiting(self) -> list[tuple[Attempt, str]]:
        """Send those whose turn has come; those that could not be sent, and why."""
        unsent = []
        while self._turns:
            ticket = self._turns.pop(0)
            attempt = self._open.get(ticket)
            reason = self._start(ticket, attempt)
            if attempt is not None and reason is not None:
                del self._open[ticket]
                self._choice.ended(attempt.message)
                unsent.append((attempt, reason))
        return unsent

    def take_slow(self, now: float) -> list[Attempt]:
        """Those that are to be hedged by now, each once; they stay on their way."""
        slow = [attempt for attempt in self._open.values() if attempt.hedge_at <= now]
        for attempt in slow:
            attempt.hedge_at = math.inf
        return slow

    def _take(self, ended: Callable[[Attempt], bool]) -> dict[int, Attempt]:
        taken = {ticket: attempt for ticket, attempt in self._open.items() if ended(attempt)}
        for ticket, attempt in taken.items():
            del self._open[ticket]
            self._choice.ended(attempt.message)
        return taken

    def _may_go(self, ticket: int, attempt: Attempt) -> bool:
        message = attempt.message
        request = attempt.flight.batch_id, message.alone
        return self._lanes.enter(ticket, host=message.endpoint.incarnation, request=request)

    def _hand_over(self, ticket: int, message: HostMessage, request: HostRequest) -> str | None:
        try:
            self._transport.send(message.endpoint, request)
        except TransportError as exc:
            self._stats.num_send_errors += 1
            if message.alone is not None:
                self._turns += self._lanes.leave(ticket)
            return str(exc)
        self._stats.num_messages += 1
        self._stats.num_bytes_sent += request.rows.nbytes
        return None

    def _start(self, ticket: int, attempt: Attempt | None) -> str | None:
        """Send what waited for its turn; None, or why it is not sent."""
        if attempt is None or attempt.waiting is None or attempt.flight.has_failed(attempt.message.alone):
            self._turns += self._lanes.leave(ticket)
            return "its request has failed"
        request, attempt.waiting, attempt.sent_at = attempt.waiting, None, self._clock.now()
        return self._hand_over(ticket, attempt.message, request)
