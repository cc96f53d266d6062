"""Which replica of an expert is sent rows: one that is known to answer, and has least to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.service.breakers import LATE_BACKOFF_S, Breakers
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from moe_runtime.service.dispatch import HostMessage
    from moe_runtime.service.ports import Clock, Endpoint
    from moe_runtime.service.routing_table import Replica


class ReplicaChoice:
    """Chooses replicas, and keeps count of the rows that each has under way. Owned by one thread.

    Ready replicas come before suspect ones, then those with the least outstanding rows, then those of the same node.
    Replicas that did not answer in time, and all of a host that was lost, are left out until their breaker lets a
    message through.

    Args:
        node: The router's own node.
        clock: Tells the time.
    """

    def __init__(self, *, node: str, clock: Clock) -> None:
        self._node = node
        self._clock = clock
        # Keys are the incarnation of a host, and that with the id of a replica on it.
        self._breakers = Breakers(clock)
        self._outstanding_rows: dict[str, int] = {}

    def choose(
        self, replicas: Sequence[Replica], *, tried: Collection[str] = (), at_any_rate: bool = False
    ) -> Replica | None:
        """A replica to send rows to; None if there is none.

        Args:
            replicas: The usable ones of an expert.
            tried: Ids of those not to be chosen.
            at_any_rate: Whether one that does not answer is better than none.
        """
        if tried:
            replicas = [replica for replica in replicas if replica.replica_id not in tried]
        if self._breakers.any_open and not at_any_rate:
            replicas = [replica for replica in replicas if self._may_answer(replica)]
        if len(replicas) <= 1:
            return replicas[0] if replicas else None
        return min(replicas, key=self._cost)

    def sent(self, message: HostMessage) -> None:
        """A message is on its way, or will be when its turn comes."""
        outstanding = self._outstanding_rows
        for _, rows, replica_id, _, _ in message.segments:
            outstanding[replica_id] = outstanding.get(replica_id, 0) + len(rows)
        if self._breakers.any_open:
            for key in _keys(message):
                self._breakers.probe(key)

    def ended(self, message: HostMessage) -> None:
        """A message that was ``sent`` is no longer waited for, however it ended."""
        for _, rows, replica_id, _, _ in message.segments:
            self._outstanding_rows[replica_id] -= len(rows)
        if self._breakers.any_open:
            for key in _keys(message):
                self._breakers.probe_ended(key)

    def answered(self, message: HostMessage) -> None:
        """A host answered a message, late maybe."""
        if self._breakers.any_open:
            for key in _keys(message):
                self._breakers.answered(key)

    def timed_out(self, message: HostMessage, *, sent_at: float) -> None:
        """A host did not answer a message in time."""
        incarnation = message.endpoint.incarnation
        for segment in message.segments:
            self._breakers.failed((incarnation, segment.replica_id), sent_at=sent_at, first_backoff_s=LATE_BACKOFF_S)

    def host_lost(self, endpoint: Endpoint) -> None:
        """A host has gone, and has not been replaced as far as is known."""
        self._breakers.failed(endpoint.incarnation, sent_at=self._clock.now())

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Forget the hosts that are not among these."""
        incarnations = {endpoint.incarnation for endpoint in endpoints}
        self._breakers.forget(lambda key: (key[0] if isinstance(key, tuple) else key) not in incarnations)

    def _may_answer(self, replica: Replica) -> bool:
        incarnation = replica.endpoint.incarnation
        return self._breakers.lets_through(incarnation) and self._breakers.lets_through(
            (incarnation, replica.replica_id)
        )

    def _cost(self, replica: Replica) -> tuple[bool, int, bool]:
        return (
            replica.state != ReplicaState.READY,
            self._outstanding_rows.get(replica.replica_id, 0),
            replica.endpoint.node != self._node,
        )


def _keys(message: HostMessage) -> list[int | tuple[int, str]]:
    incarnation = message.endpoint.incarnation
    return [incarnation, *((incarnation, segment.replica_id) for segment in message.segments)]
