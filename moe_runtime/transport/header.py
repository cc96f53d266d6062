"""Requests and replies of the data plane as frames, and back: a small msgpack header, then the rows as they are.

A message is one header frame, and the frames of its rows; but few rows are part of the header, and many may lie in
memory that both ends share. The header is an array: decoding it must cost far less than the wire. It names the
incarnation that sent the message, the one it is meant for, and the dtype and shape of the rows, which are checked
against their bytes before they are touched. Rows are in the byte order of the machine; routers and hosts of a
runtime run on the same architecture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.header_fields import (
    HEADER_VERSION,
    REPLY_ITEMS,
    REPLY_TYPES,
    REQUEST_ITEMS,
    REQUEST_TYPES,
    Address,
    Place,
    check_segment,
    found_memory,
    pack_header,
    read_dtype,
    read_place,
    rows_data,
    unpack_header,
    whole_segments,
)
from moe_runtime.transport.row_frames import MAX_INLINE_BYTES, decode_rows, dtype_name, encode_inline, encode_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

MAX_SEGMENTS = 2048
MAX_REPLICA_ID_CHARACTERS = 255
MAX_ERROR_CHARACTERS = 1000


class IncomingRequest(NamedTuple):
    """A request as it was read from frames."""

    address: Address
    request: HostRequest
    place: Place | None


class IncomingReply(NamedTuple):
    """A reply as it was read from frames."""

    address: Address
    reply: HostReply


def check_request(request: HostRequest) -> None:
    """Raise ``TransportError`` unless the segments can travel and account for exactly the rows of a request."""
    segments, rows = request.segments, request.rows
    if len(segments) > MAX_SEGMENTS:
        raise TransportError(f"request {request.ticket}: {len(segments)} segments, at most {MAX_SEGMENTS} can travel")
    num_rows = 0
    for segment in segments:
        num_rows += segment.num_rows
        if len(segment.replica_id) > MAX_REPLICA_ID_CHARACTERS:
            raise TransportError(
                f"request {request.ticket}: replica id {segment.replica_id:.40}... has "
                f"{len(segment.replica_id)} characters, at most {MAX_REPLICA_ID_CHARACTERS} can travel"
            )
    if rows.dim() < 1 or rows.shape[0] != num_rows:
        raise TransportError(
            f"request {request.ticket}: segments list {num_rows} rows, rows have shape {tuple(rows.shape)}"
        )


def check_reply(reply: HostReply) -> None:
    """Raise ``TransportError`` unless the segments without error account for exactly the rows of a reply."""
    num_rows = 0
    for result in reply.results:
        if result.error is None:
            num_rows += result.num_rows
    found = 0 if reply.rows is None else reply.rows.shape[0] if reply.rows.dim() else -1
    if found != num_rows:
        shape = None if reply.rows is None else tuple(reply.rows.shape)
        raise TransportError(f"reply {reply.ticket}: results list {num_rows} good rows, rows have shape {shape}")


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
    items: list[object] = []
    for segment in request.segments:
        items += (segment.replica_id, segment.num_rows)
    rows = request.rows
    name = dtype_name("request", request.ticket, rows)
    is_inline = place is None and rows.nbytes <= MAX_INLINE_BYTES
    packed = pack_header(
        (HEADER_VERSION, "request", request.ticket, *address, items, name, [*rows.shape],
         encode_inline(rows) if is_inline else place, float(request.timeout_s))
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
    items: list[object] = []
    for result in reply.results:
        error = None if result.error is None else result.error[:MAX_ERROR_CHARACTERS]
        items += (result.replica_id, result.num_rows, error, float(result.compute_ms))
    rows, name, shape = reply.rows, None, None
    where: bytes | bool | None = None
    if rows is not None:
        name, shape = dtype_name("reply", reply.ticket, rows), [*rows.shape]
        where = True if is_placed else encode_inline(rows) if rows.nbytes <= MAX_INLINE_BYTES else None
    packed = pack_header((HEADER_VERSION, "reply", reply.ticket, *address, items, name, shape, where, None))
    return [packed] if rows is None or where is not None else [packed, *encode_rows(rows)]


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
    header = unpack_header(frames, "request", REQUEST_TYPES)
    _, _, ticket, sender, receiver, items, name, shape, where, timeout_s = header
    if not 0.0 <= timeout_s < math.inf:
        raise TransportError(f"header field timeout_s: expected a finite time of at least 0, found {timeout_s}")
    segments = []
    for index in range(0, whole_segments(items, REQUEST_ITEMS), REQUEST_ITEMS):
        replica_id, num_rows = items[index], items[index + 1]
        check_segment(replica_id, num_rows)
        segments.append(Segment(replica_id, num_rows))
    dtype, place = read_dtype(name, shape), None
    if type(where) is list:
        place = read_place(where)
        (memory,) = found_memory(None if find is None else find(place), place)
        where = [memory[: math.prod(shape) * dtype.itemsize]]
    rows = decode_rows(rows_data(where, frames), dtype, shape)
    request = HostRequest(ticket, tuple(segments), rows, timeout_s)
    check_request(request)
    return IncomingRequest(Address(sender, receiver), request, place)


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
    header = unpack_header(frames, "reply", REPLY_TYPES)
    _, _, ticket, sender, receiver, items, name, shape, where, _ = header
    results = []
    for index in range(0, whole_segments(items, REPLY_ITEMS), REPLY_ITEMS):
        replica_id, num_rows, error, compute_ms = items[index : index + REPLY_ITEMS]
        check_segment(replica_id, num_rows)
        if type(compute_ms) is not float or (error is not None and type(error) is not str):
            raise TransportError(
                f"result: expected an error in words and milliseconds, found {error!r:.80}, {compute_ms!r:.80}"
            )
        results.append(SegmentResult(replica_id, num_rows, error, compute_ms))
    rows: Tensor | None = None
    if name is not None:
        dtype = read_dtype(name, shape)
        if where is True:
            num_bytes = math.prod(shape) * dtype.itemsize
            where = found_memory(None if find is None else find(ticket, num_bytes), ticket)
        rows = decode_rows(rows_data(where, frames), dtype, shape)
    reply = HostReply(ticket, tuple(results), rows)
    check_reply(reply)
    return IncomingReply(Address(sender, receiver), reply)
