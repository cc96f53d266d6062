"""Asks a second replica where the first takes unusually long: the first answer wins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_runtime.service.answer_times import AnswerTimes
from moe_runtime.service.dispatch import Race, make_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.service.attempts import Attempt
    from moe_runtime.service.dispatch import HostMessage, PlannedSegment
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Endpoint
    from moe_runtime.service.recovery import Recovery
    from moe_runtime.service.replica_choice import ReplicaChoice
    from moe_runtime.service.stats import RouterStats


class Hedging:
    """Knows the usual answer times of the layers that are hedged, and sends the copies. Owned by one thread.

    Dean, Barroso: The Tail at Scale (2013), https://doi.org/10.1145/2408776.2408794.

    Args:
        recovery: Sends the copies.
        choice: Chooses who gets them.
        stats: Counts them.
    """

    def __init__(self, recovery: Recovery, *, choice: ReplicaChoice, stats: RouterStats) -> None:
        self._recovery = recovery
        self._choice = choice
        self._stats = stats
        self._times: dict[tuple[str, str], AnswerTimes] = {}
        self._num_messages: dict[str, int] = {}
        self._num_copies: dict[str, int] = {}

    def answered(self, layer: RoutedLayer, segments: Sequence[PlannedSegment], *, took_s: float) -> None:
        """The experts of one message have answered."""
        if layer.hedge is None:
            return
        for segment in segments:
            key = layer.name, layer.experts[segment.expert_id].name
            times = self._times.get(key)
            if times is None:
                times = self._times[key] = AnswerTimes(layer.hedge.quantile)
            times.add(took_s)

    def wait_s(self, layer: RoutedLayer, segments: Sequence[PlannedSegment]) -> float:
        """How long a message is waited for before it is hedged; infinity for never.

        The message counts as one of those of which a share may be hedged.
        """
        if layer.hedge is None or layer.exact:
            return math.inf
        self._num_messages[layer.name] = self._num_messages.get(layer.name, 0) + 1
        longest = 0.0
        for segment in segments:
            times = self._times.get((layer.name, layer.experts[segment.expert_id].name))
            if times is None or times.usual_s is None:
                return math.inf
            longest = max(longest, times.usual_s)
        return longest * layer.hedge.times

    def hedge(self, attempt: Attempt) -> None:
        """Send copies of a message's segments to their twins, those that have one, if the layer's share allows it."""
        flight, message = attempt.flight, attempt.message
        segments: list[PlannedSegment] = []
        copies: dict[Endpoint, list[PlannedSegment]] = {}
        for segment in message.segments:
            replicas = flight.table.usable(flight.layer.name, segment.expert_id)
            twin = self._choice.choose(replicas, tried=(segment.replica_id,))
            if twin is not None:
                race = Race((segment.replica_id, twin.replica_id), num_running=2)
                segment = segment._replace(race=race)
                copies.setdefault(twin.endpoint, []).append(segment._replace(replica_id=twin.replica_id))
            segments.append(segment)
        if not self._allows(flight.layer, len(copies)):
            return
        attempt.message = message._replace(segments=tuple(segments))
        for endpoint, copied in copies.items():
            self._send(attempt, make_message(endpoint, copied))

    def _allows(self, layer: RoutedLayer, num_copies: int) -> bool:
        total = self._num_copies.get(layer.name, 0) + num_copies
        if layer.hedge is None or total > layer.hedge.max_share * self._num_messages.get(layer.name, 0):
            return False
        self._num_copies[layer.name] = total
        return True

    def _send(self, attempt: Attempt, message: HostMessage) -> None:
        flight = attempt.flight
        self._stats.num_hedges += 1
        for segment in message.segments:
            flight.log().hedged.update(segment.rows)
        self._recovery.send(flight, message)
