"""Dispatch: a plan becomes one message per expert host."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.service.ports import Segment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from moe_runtime.service.ports import Endpoint, HostReply
    from moe_runtime.service.routing_table import Replica, RoutingTable


@dataclass(frozen=True)
class PlannedSegment:
    """The planned rows ``[start, stop)`` of one expert, and the replica that is to serve them, if there is one."""

    expert_id: int
    start: int
    stop: int
    replica_id: str = ""

    @property
    def num_rows(self) -> int:
        """Rows of the segment."""
        return self.stop - self.start


@dataclass(frozen=True)
class HostMessage:
    """All planned segments of a batch that go to one expert host."""

    endpoint: Endpoint
    segments: tuple[PlannedSegment, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all segments."""
        return sum(segment.num_rows for segment in self.segments)

    def planned_ids(self) -> Tensor | slice:
        """Which planned rows the message carries, in its order; a slice where they are neighbours."""
        first, last = self.segments[0], self.segments[-1]
        if last.stop - first.start == self.num_rows:
            return slice(first.start, last.stop)
        return torch.cat([torch.arange(segment.start, segment.stop) for segment in self.segments])

    @property
    def wire_segments(self) -> tuple[Segment, ...]:
        """The segments as the host is told of them."""
        return tuple(Segment(segment.replica_id, segment.num_rows) for segment in self.segments)


@dataclass(frozen=True)
class Dispatch:
    """Where a plan's rows go.

    Attributes:
        messages: One per expert host.
        unreachable: Segments of experts that have no usable replica.
    """

    messages: tuple[HostMessage, ...]
    unreachable: tuple[PlannedSegment, ...]


def split_by_host(
    expert_offsets: Sequence[int],
    table: RoutingTable,
    *,
    layer: str,
    node: str,
    outstanding_rows: Mapping[str, int],
) -> Dispatch:
    """Choose a replica for each expert of a plan and group the experts by host.

    Args:
        expert_offsets: The plan's, ``num_experts + 1`` numbers.
        table: Version of the routing table that the batch uses.
        layer: Name of the layer.
        node: The router's own node; its replicas win ties.
        outstanding_rows: Rows under way per replica id.

    Returns:
        One message per host touched, and the segments that nobody serves.
    """
    by_host: dict[Endpoint, list[PlannedSegment]] = defaultdict(list)
    unreachable = []
    for expert_id in range(len(expert_offsets) - 1):
        start, stop = expert_offsets[expert_id], expert_offsets[expert_id + 1]
        if start == stop:
            continue
        replicas = table.usable(layer, expert_id)
        if not replicas:
            unreachable.append(PlannedSegment(expert_id, start, stop))
            continue
        replica = _least_loaded(replicas, node=node, outstanding_rows=outstanding_rows)
        by_host[replica.endpoint].append(PlannedSegment(expert_id, start, stop, replica.replica_id))
    messages = tuple(HostMessage(endpoint, tuple(segments)) for endpoint, segments in by_host.items())
    return Dispatch(messages, tuple(unreachable))


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
    asked = [(segment.replica_id, segment.num_rows) for segment in segments]
    if [(result.replica_id, result.num_rows) for result in reply.results] != asked:
        return "its host answered for other rows than it was sent"
    num_rows = sum(result.num_rows for result in reply.results if result.error is None)
    if reply.rows is None:
        return None if num_rows == 0 else f"its host sent no rows, expected {num_rows}"
    shape = (num_rows, *out_shape)
    if tuple(reply.rows.shape) != shape or reply.rows.dtype != dtype:
        return (
            f"its host sent rows of shape {tuple(reply.rows.shape)} and dtype {reply.rows.dtype}, "
            f"expected {shape} and {dtype}"
        )
    return None
