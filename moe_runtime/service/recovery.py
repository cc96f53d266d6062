"""What becomes of rows whose attempt failed: another replica, another expert, the residual, or an error."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.errors import ExpertError, PoisonedRequestError
from moe_runtime.service.attempts import Attempt
from moe_runtime.service.dispatch import PlannedSegment, as_rows, make_message
from moe_runtime.service.failures import FailedAttempt, FailureKind
from moe_runtime.service.gathering import gather_anew
from moe_runtime.service.rerouting import Rerouting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from moe_runtime.service.attempts import Attempts
    from moe_runtime.service.dispatch import HostMessage
    from moe_runtime.service.flight import Flight
    from moe_runtime.service.ports import Clock, Endpoint, SegmentResult
    from moe_runtime.service.replica_choice import ReplicaChoice
    from moe_runtime.service.routing_table import Replica
    from moe_runtime.service.stats import RouterStats


_NO_ANSWER = FailureKind.NO_ANSWER
#: Replicas that may be held up by the same rows.
_MAX_TIMEOUTS = 2
#: Hosts that may die while they have the same request alone and have not said that they have begun with it. The note
#: of a host on another node may be lost with it, so its absence is no proof of innocence for ever.
_MAX_UNBEGUN = 2


class _Failed(NamedTuple):
    """Rows that wait for what comes next."""

    flight: Flight
    segment: PlannedSegment
    reason: str


class _Placed(NamedTuple):
    """Rows that have a next replica."""

    flight: Flight
    endpoint: Endpoint
    segment: PlannedSegment


class Recovery:
    """Takes failed rows on by the steps of their layer's ``on_failure.order``. Owned by one thread.

    Failures are collected, and go on when ``run`` is called: rows that go to the same host then share a message. A
    replica that does not answer is asked only where no other step leads anywhere. Rows that two replicas did not answer
    in time go no further: whatever holds up their hosts is not to hold up all the others.

    Args:
        attempts: Sends what is tried anew.
        choice: Chooses replicas.
        stats: Counts poisoned requests.
        clock: Tells the time.
    """

    def __init__(self, attempts: Attempts, *, choice: ReplicaChoice, stats: RouterStats, clock: Clock) -> None:
        self._attempts = attempts
        self._choice = choice
        self._stats = stats
        self._clock = clock
        self._failed: list[_Failed] = []

    @property
    def has_work(self) -> bool:
        """Whether ``run`` has something to do."""
        return bool(self._failed)

    def unreachable(self, flight: Flight, segments: Iterable[PlannedSegment]) -> None:
        """Rows that no replica could be chosen for."""
        for segment in segments:
            replicas = flight.table.usable(flight.layer.name, segment.expert_id)
            reason = "its replicas do not answer" if replicas else "no replica is ready"
            self._failed.append(_Failed(flight, segment, reason))

    def fail(
        self, flight: Flight, segments: Iterable[PlannedSegment], reason: str, *, kind: FailureKind = _NO_ANSWER
    ) -> None:
        """An attempt at these rows has failed."""
        for segment in segments:
            if self._is_over(flight, segment, reason, kind):
                self._failed.append(_Failed(flight, _tried(segment, kind=kind), reason))

    def fail_rows(
        self, flight: Flight, segment: PlannedSegment, result: SegmentResult, values: Tensor
    ) -> tuple[PlannedSegment, Tensor]:
        """Some rows of an attempt have failed; the others, with their values."""
        tried = segment.tried
        if flight.layer.exact:
            # Another replica would be sent fewer rows, and a product of another size has other bits.
            tried += tuple(each.replica_id for each in flight.table.usable(flight.layer.name, segment.expert_id))
        failed = [segment.rows[place] for place in result.failed_rows]
        after = PlannedSegment(
            segment.expert_id, as_rows(failed), segment.replica_id, segment.history._replace(tried=tried)
        )
        self.fail(flight, (after,), result.error or "it failed", kind=FailureKind.of(result))
        good = sorted({*range(len(segment.rows))}.difference(result.failed_rows))
        return segment._replace(rows=as_rows([segment.rows[place] for place in good])), values[torch.tensor(good)]

    def host_died(
        self, flight: Flight, segments: Iterable[PlannedSegment], reason: str, *, had_begun: bool = False
    ) -> None:
        """A host has died while it had these rows: from now on their requests travel alone; those that did, fail.

        Not, for once or twice, those that the host had not begun with: it died of something else.
        """
        for segment in segments:
            if not self._is_over(flight, segment, reason, _NO_ANSWER):
                continue
            history = segment.history
            if history.alone is not None and not had_begun:
                history = history._replace(num_unbegun=history.num_unbegun + 1)
            is_guilty = history.alone is not None and (had_begun or history.num_unbegun > _MAX_UNBEGUN)
            for request, rows in flight.by_request(segment.rows):
                if is_guilty:
                    self._poison(flight, request)
                suspect = _tried(segment._replace(rows=rows, history=history), alone=request)
                self._failed.append(_Failed(flight, suspect, reason))

    def run(self) -> None:
        """Let all failed rows go on, until none is left that has failed."""
        while self._failed:
            failed, self._failed = sorted(self._failed, key=_company), []
            for _, company in groupby(failed, key=_company):
                # Sent before the next are placed, so that those see what each replica has to do.
                self._send([placed for each in company for placed in self._place(each)])

    def attempt_s(self, flight: Flight, segments: Iterable[PlannedSegment], *, now: float) -> float:
        """Seconds that an attempt at these rows gets: half of what remains, all of it where nothing could follow."""
        remaining_s = flight.deadline - now
        return remaining_s / 2 if self._may_go_on(flight, segments) else remaining_s

    def _may_go_on(self, flight: Flight, segments: Iterable[PlannedSegment]) -> bool:
        layer, table = flight.layer, flight.table
        num_others = flight.num_reachable() - layer.policy.max_k if layer.can_reroute else 0
        for segment in segments:
            if segment.history.num_timeouts + 1 >= _MAX_TIMEOUTS:
                continue
            num_moves = segment.history.num_moves
            is_routed = segment.expert_id < layer.num_routed
            if is_routed and num_moves < min(num_others, layer.capacity.max_reroutes):
                return True
            replicas = table.usable(layer.name, segment.expert_id)
            if len(replicas) > 1 and "replica" in layer.on_failure.order:
                tried = segment.tried
                if any(replica.replica_id not in tried for replica in replicas):
                    return True
        return False

    def _is_over(self, flight: Flight, segment: PlannedSegment, reason: str, kind: FailureKind) -> bool:
        """Write a failed attempt down; whether no other replica is at work on the rows, or has been."""
        race = segment.race
        if race is not None and race.is_won:
            return False
        flight.log().attempts.append(FailedAttempt(segment.expert_id, segment.rows, reason, kind))
        timed_out = kind is FailureKind.TIMED_OUT
        flight.stats.count_failed_attempt(segment.expert_id, num_rows=len(segment.rows), timed_out=timed_out)
        return race is None or race.is_lost_by_one()

    def _poison(self, flight: Flight, request: int) -> None:
        if not flight.has_failed(request):
            self._stats.num_poisoned += 1
            flight.log().errors[request] = PoisonedRequestError(
                f"layer {flight.layer.name}: {flight.request_name(request)}: two expert hosts died while they had it,"
                " the second when it was sent alone; send it again only if they may have died of something else"
            )

    def _place(self, failed: _Failed) -> Iterator[_Placed]:
        """The next replicas of some rows; those for which there is none are given up."""
        flight, segment, reason = failed
        segment = _without_failed_requests(flight, segment)
        if not segment.rows:
            return
        if self._clock.now() < flight.awaited_until and segment.history.num_timeouts < _MAX_TIMEOUTS:
            for step in flight.layer.on_failure.order:
                if step == "replica" and (twin := self._twin(flight, segment)) is not None:
                    yield self._to_twin(flight, segment, twin)
                    return
                if step == "reroute":
                    moved, segment = self._reroute(flight, segment, reason)
                    yield from moved
                    if not segment.rows:
                        return
            if (last := self._twin(flight, segment, at_any_rate=True)) is not None:
                yield self._to_twin(flight, segment, last)
                return
        self._give_up(flight, segment, reason)

    def _twin(self, flight: Flight, segment: PlannedSegment, *, at_any_rate: bool = False) -> Replica | None:
        history, layer = segment.history, flight.layer
        if history.tried and "replica" not in layer.on_failure.order:
            return None
        replicas = flight.table.usable(layer.name, segment.expert_id)
        return self._choice.choose(replicas, tried=history.tried, at_any_rate=at_any_rate)

    def _to_twin(self, flight: Flight, segment: PlannedSegment, twin: Replica) -> _Placed:
        if segment.history.tried:
            flight.log().retried.update(segment.rows)
        return _Placed(flight, twin.endpoint, segment._replace(replica_id=twin.replica_id))

    def _reroute(self, flight: Flight, segment: PlannedSegment, reason: str) -> tuple[list[_Placed], PlannedSegment]:
        """Rows that found another expert, and the segment of those that did not."""
        layer, history = flight.layer, segment.history
        limit = layer.capacity.max_reroutes - history.num_moves
        if limit <= 0 or not layer.can_reroute or segment.expert_id >= layer.num_routed:
            return [], segment
        flight.rerouting = flight.rerouting or Rerouting(flight.plan)
        routed = layer.experts[: layer.num_routed]
        choices = [self._choice.choose(flight.table.usable(layer.name, expert.expert_id)) for expert in routed]
        experts = flight.rerouting.choose(
            flight.token_ids(segment.rows), usable=[choice is not None for choice in choices], limit=limit
        )
        moved = history._replace(num_moves=history.num_moves + 1)
        placed = []
        for expert_id, replica in enumerate(choices):
            rows = [row for row, chosen in zip(segment.rows, experts, strict=True) if chosen == expert_id]
            if rows and replica is not None:
                self._note_unreachable(flight, segment._replace(rows=rows), reason)
                flight.log().moves.update(dict.fromkeys(rows, expert_id))
                new = PlannedSegment(expert_id, as_rows(rows), replica.replica_id, moved)
                placed.append(_Placed(flight, replica.endpoint, new))
        left = [row for row, chosen in zip(segment.rows, experts, strict=True) if chosen is None]
        return placed, segment._replace(rows=as_rows(left) if left else ())

    def _note_unreachable(self, flight: Flight, segment: PlannedSegment, reason: str) -> None:
        """Write down what there was no attempt at; attempts were written down when they failed."""
        if not segment.history.tried:
            flight.log().attempts.append(FailedAttempt(segment.expert_id, segment.rows, reason, _NO_ANSWER))

    def _give_up(self, flight: Flight, segment: PlannedSegment, reason: str) -> None:
        flight.give_up(segment.rows)
        self._note_unreachable(flight, segment, reason)
        if flight.layer.on_failure.order[-1] == "error":
            name = flight.layer.experts[segment.expert_id].name
            for request, _ in flight.by_request(segment.rows):
                error = ExpertError(f"layer {flight.layer.name}: expert {name}: {reason}")
                flight.log().errors.setdefault(request, error)

    def _send(self, placed: list[_Placed]) -> None:
        for _, same_host in groupby(sorted(placed, key=_host), key=_host):
            group = list(same_host)
            segments = [each.segment for each in group]
            self.send(group[0].flight, make_message(group[0].endpoint, segments, alone=segments[0].history.alone))

    def send(self, flight: Flight, message: HostMessage) -> None:
        """Send rows of a batch that were dispatched before, to another replica."""
        now = self._clock.now()
        deadline = now + self.attempt_s(flight, message.segments, now=now)
        reason = self._attempts.send(Attempt(flight, message, now, deadline), gather_anew(flight, message))
        if reason is not None:
            self.fail(flight, message.segments, reason)


def _tried(segment: PlannedSegment, *, alone: int | None = None, kind: FailureKind = _NO_ANSWER) -> PlannedSegment:
    """The segment without its replica, which has failed it."""
    history = segment.history
    # Where two raced, neither has answered.
    num_timeouts = history.num_timeouts + (kind is FailureKind.TIMED_OUT) * (1 if segment.race is None else 2)
    after = history._replace(
        tried=segment.tried, num_timeouts=num_timeouts, alone=history.alone if alone is None else alone
    )
    return PlannedSegment(segment.expert_id, segment.rows, history=after)


def _without_failed_requests(flight: Flight, segment: PlannedSegment) -> PlannedSegment:
    """The segment without the rows of requests that are answered with an error; those are given up."""
    if flight.failures is None or not flight.failures.errors:
        return segment
    kept: list[int] = []
    for request, rows in flight.by_request(segment.rows):
        if flight.has_failed(request):
            flight.give_up(rows)
        else:
            kept += rows
    return segment._replace(rows=as_rows(kept) if kept else ())


def _company(failed: _Failed) -> tuple[int, int]:
    """Equal for rows that may share a message."""
    alone = failed.segment.history.alone
    return failed.flight.batch_id, -1 if alone is None else alone


def _host(placed: _Placed) -> int:
    return placed.endpoint.incarnation
