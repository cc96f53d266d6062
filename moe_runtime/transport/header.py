"""Requests and replies of the data plane as frames, and back: a small msgpack header, then the rows as they are.

A message is one header frame, and the frames of its rows; but few rows are part of the header, and many may lie in
memory that both ends share. The header is an array: decoding it must cost far less than the wire. It names the
incarnation that sent the message, the one it is meant for, and the dtype and shape of the rows, which are checked
against their bytes before they are touched. Rows are in the byte order of the machine; routers and hosts of a
runtime run on the same architecture.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import msgspec

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import MAX_REPLICA_ID_CHARACTERS, HostReply, HostRequest, SegmentResult
from moe_runtime.transport.header_fields import (
    HEADER_VERSION,
    MAX_REQUEST_IDS,
    MAX_SEGMENTS,
    Address,
    HeaderReader,
    Place,
    ReplyHeader,
    RequestHeader,
    found_memory,
    no_more_frames,
    pack_header,
    read_dtype,
)
from moe_runtime.transport.row_frames import (
    MAX_INLINE_BYTES,
    copy_rows,
    decode_rows,
    dtype_name,
    encode_inline,
    encode_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from moe_runtime.service.ports import Segment

MAX_ERROR_CHARACTERS = 1000

_REQUESTS = HeaderReader(RequestHeader, kind="request")
_REPLIES = HeaderReader(ReplyHeader, kind="reply")


class IncomingRequest(msgspec.Struct, frozen=True, gc=False):
    """A request as it was read from frames."""

    address: Address
    request: HostRequest
    place: Place | None


class IncomingReply(msgspec.Struct, frozen=True, gc=False):
    """A reply as it was read from frames."""

    address: Address
    reply: HostReply


def check_request(request: HostRequest) -> None:
    """Raise ``TransportError`` unless the segments can travel and account for exactly the rows of a request."""
    segments = request.segments
    if len(segments) > MAX_SEGMENTS:
        raise TransportError(f"request {request.ticket}: {len(segments)} segments, at most {MAX_SEGMENTS} can travel")
    for segment in segments:
        if len(segment.replica_id) > MAX_REPLICA_ID_CHARACTERS:
            raise TransportError(
                f"request {request.ticket}: replica id {segment.replica_id:.40}... has "
                f"{len(segment.replica_id)} characters, at most {MAX_REPLICA_ID_CHARACTERS} can travel"
            )
    _check_requested_rows(request.ticket, segments, request.rows.shape)


def check_reply(reply: HostReply) -> None:
    """Raise ``TransportError`` unless the results account for exactly the rows of a reply."""
    _check_good_rows(reply.ticket, reply.results, None if reply.rows is None else reply.rows.shape)


def encode_request(request: HostRequest, *, address: Address, place: Place | None = None) -> list[Any]:
    """Frames of a request. They share the memory of its rows, which must not change until they are sent.

    Args:
        request: What to send.
        address: From whom to whom.
        place: Where its rows lie already; then they are not sent.

    Raises:
        TransportError: If the segments do not account for the rows, or the message exceeds a limit.
    """
    check_request(request)
    ticket, rows = request.ticket, request.rows
    name = dtype_name("request", ticket, rows)
    is_inline = place is None and rows.nbytes <= MAX_INLINE_BYTES
    packed = pack_header(
        RequestHeader(
            HEADER_VERSION, "request", ticket, address, request.segments, name, rows.shape,
            encode_inline(rows) if is_inline else place, request.timeout_s, request.request_ids[:MAX_REQUEST_IDS],
            request.is_suspect,
        )
    )  # fmt: skip
    return [packed] if is_inline or place is not None else [packed, *encode_rows(rows)]


def encode_reply(reply: HostReply, *, address: Address, is_placed: bool = False) -> list[Any]:
    """Frames of a reply. They share the memory of its rows, which must not change until they are sent.

    Args:
        reply: What to send.
        address: From whom to whom.
        is_placed: Whether its rows lie where the request's did; then they are not sent.

    Raises:
        TransportError: If the results do not account for the rows, or the message exceeds a limit.
    """
    check_reply(reply)
    ticket, rows = reply.ticket, reply.rows
    results = tuple([each if each.error is None else _with_short_error(each) for each in reply.results])
    if rows is None:
        header = ReplyHeader(HEADER_VERSION, "reply", ticket, address, results, None, None, None, reply.is_begun)
        return [pack_header(header)]
    name = dtype_name("reply", ticket, rows)
    where = True if is_placed else encode_inline(rows) if rows.nbytes <= MAX_INLINE_BYTES else None
    packed = pack_header(ReplyHeader(HEADER_VERSION, "reply", ticket, address, results, name, rows.shape, where, False))
    return [packed] if where is not None else [packed, *encode_rows(rows)]


def decode_request(
    frames: Sequence[memoryview], *, find: Callable[[Place], memoryview | None] | None = None
) -> IncomingRequest:
    """The request in some frames; large rows share the memory of their frame, or lie in shared memory.

    Args:
        frames: Header and rows.
        find: Gives the shared memory at a place, None where there is none.

    Raises:
        TransportError: If the frames are anything but a well-formed request.
    """
    header = _REQUESTS.read(frames)
    ticket, segments, shape, where = header.ticket, header.segments, header.shape, header.rows
    _check_requested_rows(ticket, segments, shape)
    dtype, place = read_dtype(header.dtype), None
    if where is None:
        rows = decode_rows(frames[1:], dtype, shape)
    else:
        no_more_frames(frames)
        if isinstance(where, Place):
            place = where
            memory = found_memory(None if find is None else find(place), place)
            rows = decode_rows([memory[: math.prod(shape) * dtype.itemsize]], dtype, shape)
        else:
            rows = copy_rows(where, dtype, shape)
    request = HostRequest(ticket, segments, rows, header.timeout_s, header.request_ids, header.is_suspect)
    return IncomingRequest(header.address, request, place)


def decode_reply(
    frames: Sequence[memoryview], *, find: Callable[[int, int], memoryview | None] | None = None
) -> IncomingReply:
    """The reply in some frames; large rows share the memory of their frame, or lie in shared memory.

    Args:
        frames: Header and rows.
        find: Gives the first bytes of the memory that was lent to a ticket's request; None where there is none.

    Raises:
        TransportError: If the frames are anything but a well-formed reply.
    """
    header = _REPLIES.read(frames)
    ticket, results, name, shape, where = header.ticket, header.results, header.dtype, header.shape, header.rows
    _check_good_rows(ticket, results, shape)
    if header.is_begun and results:
        raise TransportError(f"reply {ticket}: expected no results in a note that it is begun, found {len(results)}")
    rows: Tensor | None = None
    if name is None or shape is None:
        if name is not None or shape is not None or where is not None:
            raise TransportError(f"header: the fields dtype, shape and rows do not fit together: {name!r:.40}, {shape}")
        no_more_frames(frames)
    elif where is None:
        rows = decode_rows(frames[1:], read_dtype(name), shape)
    else:
        no_more_frames(frames)
        rows = _given_rows(where, read_dtype(name), shape, ticket=ticket, find=find)
    return IncomingReply(header.address, HostReply(ticket, results, rows, header.is_begun))


def _given_rows(
    where: memoryview | bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    ticket: int,
    find: Callable[[int, int], memoryview | None] | None,
) -> Tensor:
    if isinstance(where, memoryview):
        return copy_rows(where, dtype, shape)
    if not where:
        raise TransportError("header field rows: expected bytes, true or null, found false")
    num_bytes = math.prod(shape) * dtype.itemsize
    return decode_rows([found_memory(None if find is None else find(ticket, num_bytes), ticket)], dtype, shape)


def _check_requested_rows(ticket: int, segments: tuple[Segment, ...], shape: tuple[int, ...]) -> None:
    num_rows = 0
    for segment in segments:
        num_rows += segment.num_rows
    if not shape or shape[0] != num_rows:
        raise TransportError(f"request {ticket}: segments list {num_rows} rows, rows have shape {tuple(shape)}")


def _check_good_rows(ticket: int, results: tuple[SegmentResult, ...], shape: tuple[int, ...] | None) -> None:
    num_rows = 0
    for result in results:
        if result.failed_rows:
            _check_failed_rows(ticket, result)
        if result.has_rows:
            num_rows += result.num_rows
    found = 0 if shape is None else shape[0] if shape else -1
    if found != num_rows:
        at = None if shape is None else tuple(shape)
        raise TransportError(f"reply {ticket}: results list {num_rows} rows, rows have shape {at}")


def _check_failed_rows(ticket: int, result: SegmentResult) -> None:
    failed, num_rows = result.failed_rows, result.num_rows
    is_ascending = all(first < second for first, second in itertools.pairwise(failed))
    if result.error is None or not is_ascending or failed[-1] >= num_rows or len(failed) == num_rows:
        raise TransportError(
            f"reply {ticket}: {result.replica_id:.40}: expected an error and some of its {num_rows} rows, ascending, "
            f"as failed_rows, found {failed[:8]}"
        )


def _with_short_error(result: SegmentResult) -> SegmentResult:
    error = None if result.error is None else result.error[:MAX_ERROR_CHARACTERS]
    return msgspec.structs.replace(result, error=error)
