"""A host's request as calls of its experts, and the answers where nothing came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.experts.host import ExpertCall
from moe_runtime.service.ports import HostReply, SegmentResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from moe_runtime.service.ports import HostRequest


def calls_of(request: HostRequest) -> Iterable[ExpertCall]:
    """One call per segment, in their order."""
    segments, rows = request.segments, request.rows
    if len(segments) == 1:
        return (ExpertCall(segments[0].replica_id, rows),)
    parts = torch.split(rows, [segment.num_rows for segment in segments])
    return [ExpertCall(segment.replica_id, part) for segment, part in zip(segments, parts, strict=True)]


def too_late(request: HostRequest) -> HostReply:
    """The answer to a request that has waited longer than its router does."""
    error = f"it waited at its host for longer than {request.timeout_s} s"
    results = tuple(SegmentResult(segment.replica_id, segment.num_rows, error) for segment in request.segments)
    return HostReply(request.ticket, results, rows=None)


def all_failed(results: Iterable[SegmentResult], error: str) -> tuple[SegmentResult, ...]:
    """The same without rows; those that had no error have this one."""
    return tuple(
        SegmentResult(
            result.replica_id,
            result.num_rows,
            result.error or error,
            result.compute_ms,
            is_expert_error=result.is_expert_error,
        )
        for result in results
    )


def mismatch(rows: Tensor, first: Tensor) -> str | None:
    """Why rows cannot travel in one message with the first of it, or None if they can."""
    if rows.shape[1:] == first.shape[1:] and rows.dtype == first.dtype:
        return None
    return (
        f"expected rows like the message's first, {list(first.shape[1:])} {first.dtype}, "
        f"found {list(rows.shape[1:])} {rows.dtype}"
    )
