"""Dispatch: a plan becomes one message per expert host."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.service.ports import Segment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from moe_runtime.service.ports import Endpoint, HostReply
    from moe_runtime.service.routing_table import Replica, RoutingTable


class PlannedSegment(NamedTuple):
    """The planned rows ``[start, stop)`` of one expert, and the replica that is to serve them, if there is one."""

    expert_id: int
    start: int
    stop: int
    replica_id: str = ""

    @property
    def num_rows(self) -> int:
        """Rows of the segment."""
        return self.stop - self.start


class HostMessage(NamedTuple):
    """All planned segments of a batch that go to one expert host.

    Attributes:
        endpoint: The host's.
        segments: At least one, in the order of the plan.
        num_rows: Rows of all segments.
    """

    endpoint: Endpoint
    segments: tuple[PlannedSegment, ...]
    num_rows: int

    @property
    def start(self) -> int:
        """The first of its planned rows."""
        return self.segments[0].start

    @property
    def is_one_run(self) -> bool:
        """Whether its planned rows are neighbours."""
        return self.segments[-1].stop - self.start == self.num_rows

    def planned_ids(self) -> Tensor | slice:
        """Which planned rows the message carries, in its order; a slice where they are neighbours."""
        if self.is_one_run:
            return slice(self.start, self.start + self.num_rows)
        return torch.cat([torch.arange(segment.start, segment.stop) for segment in self.segments])

    def wire_segments(self) -> tuple[Segment, ...]:
        """The segments as the host is told of them."""
        return tuple([Segment(replica_id, stop - start) for _, start, stop, replica_id in self.segments])


class Dispatch(NamedTuple):
    """Where a plan's rows go.

    Attributes:
        messages: One per expert host.
        unreachable: Segments of experts that have no usable replica.
    """

    messages: tuple[HostMessage, ...]
    unreachable: tuple[PlannedSegment, ...]


def split_by_host(
    rows_per_expert: Sequence[int],
    table: RoutingTable,
    *,
    layer: str,
    node: str,
    outstanding_rows: Mapping[str, int],
) -> Dispatch:
    """Choose a replica for each expert of a plan and group the experts by host.

    Args:
        rows_per_expert: The plan's.
        table: Version of the routing table that the batch uses.
        layer: Name of the layer.
        node: The router's own node; its replicas win ties.
        outstanding_rows: Rows under way per replica id.

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
        replicas = table.usable(layer, expert_id)
        if not replicas:
            unreachable.append(PlannedSegment(expert_id, start, stop))
            continue
        replica = _least_loaded(replicas, node=node, outstanding_rows=outstanding_rows)
        segment = PlannedSegment(expert_id, start, stop, replica.replica_id)
        incarnation = replica.endpoint.incarnation
        if incarnation in by_host:
            by_host[incarnation].append(segment)
        else:
            by_host[incarnation] = [segment]
            endpoints[incarnation] = replica.endpoint
    messages = [
        HostMessage(endpoints[host], tuple(segments), sum([stop - start for _, start, stop, _ in segments]))
        for host, segments in by_host.items()
    ]
    return Dispatch(tuple(messages), tuple(unreachable))


def _least_loaded(replicas: Sequence[Replica], *, node: str, outstanding_rows: Mapping[str, int]) -> Replica:
    if len(replicas) == 1:
        return replicas[0]
    return min(
        replicas,
        key=lambda replica: (outstanding_rows.get(replica.replica_id, 0), replica.endpoint.node != node),
    )


def fault_in(
    reply: HostReply, segments: Sequence[PlannedSegment], *, out_shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """What is wrong with a host's reply as a whole, in words; None where its rows can be used."""
    results, rows = reply.results, reply.rows
    if len(results) != len(segments):
        return _OTHER_ROWS
    num_rows = 0
    for (_, start, stop, replica_id), result in zip(segments, results, strict=True):
        if result.num_rows != stop - start or result.replica_id != replica_id:
            return _OTHER_ROWS
        if result.error is None:
            num_rows += stop - start
    if rows is None:
        return None if num_rows == 0 else f"its host sent no rows, expected {num_rows}"
    shape = (num_rows, *out_shape)
    if rows.shape != shape or rows.dtype != dtype:
        return f"its host sent rows of shape {tuple(rows.shape)} and dtype {rows.dtype}, expected {shape} and {dtype}"
    return None


_OTHER_ROWS = "its host answered for other rows than it was sent"
