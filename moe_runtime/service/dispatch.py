"""Dispatch: a plan becomes one message per expert host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.service.ports import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moe_runtime.service.ports import Endpoint, HostReply
    from moe_runtime.service.replica_choice import ReplicaChoice
    from moe_runtime.service.routing_table import RoutingTable


class History(NamedTuple):
    """What planned rows have been through.

    Attributes:
        tried: Replicas that failed them.
        num_moves: Experts that they were moved to.
        num_timeouts: Replicas that did not answer in time.
        alone: Where a host died while it had them: the request, by its place in the batch, whose rows they are, and
            with which alone they travel from then on.
        num_unbegun: Hosts that died while they had them alone and had not begun with them, as far as is known.
    """

    tried: tuple[str, ...] = ()
    num_moves: int = 0
    num_timeouts: int = 0
    alone: int | None = None
    num_unbegun: int = 0


_FRESH = History()


@dataclass(slots=True, eq=False)
class Race:
    """Replicas that work on the same rows; the first answer wins.

    Attributes:
        replica_ids: All of them.
        num_running: Those that may still answer.
        is_won: Whether one has.
    """

    replica_ids: tuple[str, ...]
    num_running: int
    is_won: bool = False

    def is_lost_by_one(self) -> bool:
        """Note that a replica failed; whether it was the last."""
        self.num_running -= 1
        return self.num_running == 0


class PlannedSegment(NamedTuple):
    """Planned rows of one expert, and the replica that is to serve them, if there is one.

    Attributes:
        expert_id: The expert's.
        rows: Which planned rows; a range where they are neighbours.
        replica_id: The replica's.
        history: What they have been through.
        race: With which other replica; None where one works on them.
    """

    expert_id: int
    rows: Sequence[int]
    replica_id: str = ""
    history: History = _FRESH
    race: Race | None = None

    @property
    def tried(self) -> tuple[str, ...]:
        """Replicas that have failed these rows once the present ones have."""
        present = (self.replica_id,) if self.race is None else self.race.replica_ids
        return (*self.history.tried, *(replica_id for replica_id in present if replica_id))


class HostMessage(NamedTuple):
    """Planned segments of a batch that go to one expert host.

    Attributes:
        endpoint: The host's.
        segments: At least one.
        num_rows: Rows of all segments.
        alone: The only request of the batch whose rows it carries, because hosts may die of it.
    """

    endpoint: Endpoint
    segments: tuple[PlannedSegment, ...]
    num_rows: int
    alone: int | None = None

    def planned_ids(self) -> Tensor | slice:
        """Which planned rows the message carries, in its order; a slice where they are neighbours."""
        start = stop = self.segments[0].rows[0]
        for segment in self.segments:
            rows = segment.rows
            if not isinstance(rows, range) or rows.start != stop:
                return torch.tensor([row for segment in self.segments for row in segment.rows])
            stop = rows.stop
        return slice(start, stop)

    def wire_segments(self) -> tuple[Segment, ...]:
        """The segments as the host is told of them."""
        return tuple([Segment(replica_id, len(rows)) for _, rows, replica_id, _, _ in self.segments])


class Dispatch(NamedTuple):
    """Where a plan's rows go.

    Attributes:
        messages: One per expert host.
        unreachable: Segments of experts that have no usable replica.
    """

    messages: tuple[HostMessage, ...]
    unreachable: tuple[PlannedSegment, ...]


def split_by_host(
    rows_per_expert: Sequence[int], table: RoutingTable, *, layer: str, choice: ReplicaChoice
) -> Dispatch:
    """Choose a replica for each expert of a plan and group the experts by host.

    Args:
        rows_per_expert: The plan's.
        table: Version of the routing table that the batch uses.
        layer: Name of the layer.
        choice: Chooses among an expert's replicas.

    Returns:
        One message per host touched, and the segments that nobody serves.
    """
    by_host: dict[int, list[PlannedSegment]] = {}
    endpoints: dict[int, Endpoint] = {}
    unreachable = []
    stop = 0
    for expert_id, num_rows in enumerate(rows_per_expert):
        start, stop = stop, stop + num_rows
        if not num_rows:
            continue
        replica = choice.choose(table.usable(layer, expert_id))
        if replica is None:
            unreachable.append(PlannedSegment(expert_id, range(start, stop)))
            continue
        segment = PlannedSegment(expert_id, range(start, stop), replica.replica_id)
        incarnation = replica.endpoint.incarnation
        if incarnation in by_host:
            by_host[incarnation].append(segment)
        else:
            by_host[incarnation] = [segment]
            endpoints[incarnation] = replica.endpoint
    messages = [make_message(endpoints[host], segments) for host, segments in by_host.items()]
    return Dispatch(tuple(messages), tuple(unreachable))


def make_message(endpoint: Endpoint, segments: Sequence[PlannedSegment], *, alone: int | None = None) -> HostMessage:
    """The message that carries some segments to a host."""
    return HostMessage(endpoint, tuple(segments), sum([len(segment.rows) for segment in segments]), alone)


def as_rows(planned_ids: Sequence[int]) -> Sequence[int]:
    """The same ascending rows, as a range where they are neighbours."""
    start, stop = planned_ids[0], planned_ids[-1] + 1
    return range(start, stop) if stop - start == len(planned_ids) else planned_ids


def fault_in(
    reply: HostReply, segments: Sequence[PlannedSegment], *, out_shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """What is wrong with a host's reply as a whole, in words; None where its rows can be used."""
    results, rows = reply.results, reply.rows
    if len(results) != len(segments):
        return _OTHER_ROWS
    num_rows = 0
    for (_, planned, replica_id, _, _), result in zip(segments, results, strict=True):
        if result.num_rows != len(planned) or result.replica_id != replica_id:
            return _OTHER_ROWS
        if result.error is None:
            num_rows += len(planned)
        elif result.failed_rows:
            if result.failed_rows[-1] >= len(planned):
                return _OTHER_ROWS
            num_rows += len(planned)
    if rows is None:
        return None if num_rows == 0 else f"its host sent no rows, expected {num_rows}"
    shape = (num_rows, *out_shape)
    if rows.shape != shape or rows.dtype != dtype:
        return f"its host sent rows of shape {tuple(rows.shape)} and dtype {rows.dtype}, expected {shape} and {dtype}"
    return None


_OTHER_ROWS = "its host answered for other rows than it was sent"
