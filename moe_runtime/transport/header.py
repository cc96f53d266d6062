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

import msgpack

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.row_frames import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_INLINE_BYTES,
    check_size,
    decode_rows,
    dtype_name,
    encode_inline,
    encode_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

HEADER_VERSION = 2
#: Enough for the reply to any request: the longest ids and errors for the largest number of segments.
MAX_HEADER_BYTES = 16 << 20
MAX_SEGMENTS = 2048
MAX_REPLICA_ID_CHARACTERS = 255
MAX_ERROR_CHARACTERS = 1000

#: What the header's items are, in order; the last is the request's time, which a reply has none of.
FIELDS = ("version", "kind", "ticket", "from", "to", "segments", "dtype", "shape", "rows", "timeout_s")
#: ``rows`` is None where they are frames; the bytes themselves; a place in shared memory, in a request; True in a
#: reply, where they lie where the request's did.
#: Items that one segment takes in ``segments``: replica id and rows; in a reply also error and milliseconds.
_REQUEST_ITEMS, _REPLY_ITEMS = 2, 4


class Address(NamedTuple):
    """Which process a message comes from, and which it is meant for, as incarnations."""

    sender: int
    receiver: int


class Place(NamedTuple):
    """Where in shared memory the rows of a request lie, and how much room is there for those of its reply."""

    segment_id: int
    offset: int
    num_bytes: int


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
    packed = _pack(
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
    packed = _pack((HEADER_VERSION, "reply", reply.ticket, *address, items, name, shape, where, None))
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
    header = _decode_header(frames, expected="request")
    timeout_s = _checked(header, 9, float)
    if not (math.isfinite(timeout_s) and timeout_s >= 0):
        raise TransportError(f"header field timeout_s: expected a finite time of at least 0, found {timeout_s}")
    dtype, shape = _decode_layout(header)
    data, place = _decode_data(header, frames), None
    if data is None:
        place = _decode_place(header[8])
        memory = _found(None if find is None else find(place), place)
        data = [memory[: math.prod(shape) * dtype.itemsize]]
    items = _decode_items(header, _REQUEST_ITEMS)
    segments = tuple(Segment(_replica_id(items[i]), _count(items[i + 1])) for i in range(0, len(items), _REQUEST_ITEMS))
    request = HostRequest(_unsigned(header, 2), segments, decode_rows(data, dtype, shape), timeout_s)
    check_request(request)
    return IncomingRequest(_decode_address(header), request, place)


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
    header = _decode_header(frames, expected="reply")
    ticket = _unsigned(header, 2)
    items = _decode_items(header, _REPLY_ITEMS)
    results = tuple(_decode_result(*items[i : i + _REPLY_ITEMS]) for i in range(0, len(items), _REPLY_ITEMS))
    rows: Tensor | None = None
    if header[6] is not None:
        dtype, shape = _decode_layout(header)
        data = _decode_data(header, frames)
        if data is None:
            _checked(header, 8, bool)
            num_bytes = math.prod(shape) * dtype.itemsize
            data = [_found(None if find is None else find(ticket, num_bytes), ticket)]
        rows = decode_rows(data, dtype, shape)
    reply = HostReply(ticket, results, rows)
    check_reply(reply)
    return IncomingReply(_decode_address(header), reply)


def _pack(header: Sequence[object]) -> bytes:
    packed: bytes = msgpack.packb(header)
    if len(packed) > MAX_HEADER_BYTES:
        check_size(f"header of {header[1]} {header[2]}", len(packed), MAX_HEADER_BYTES)
    return packed


def _decode_header(frames: Sequence[memoryview], *, expected: str) -> list[Any]:
    if not frames:
        raise TransportError("expected a header frame, found none")
    check_size("header", frames[0].nbytes, MAX_HEADER_BYTES)
    try:
        header = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise TransportError(f"header is not msgpack: {exc}") from exc
    if type(header) is not list or len(header) != len(FIELDS):
        raise TransportError(f"header: expected an array of {len(FIELDS)} items, found {header!r:.80}")
    version, kind = header[0], header[1]
    if version != HEADER_VERSION or kind != expected:
        raise TransportError(
            f"header: expected {expected} of version {HEADER_VERSION}, found {kind!r:.40} of {version!r:.40}"
        )
    return header


def _decode_address(header: list[Any]) -> Address:
    return Address(sender=_unsigned(header, 3), receiver=_unsigned(header, 4))


def _decode_items(header: list[Any], num_items: int) -> list[Any]:
    items: list[Any] = _checked(header, 5, list)
    if len(items) % num_items:
        raise TransportError(f"header field segments: expected {num_items} items each, found {items!r:.80}")
    return items


def _decode_layout(header: list[Any]) -> tuple[Any, list[int]]:
    dtype = DTYPES.get(_checked(header, 6, str))
    if dtype is None:
        raise TransportError(f"header field dtype: expected one of {[*DTYPES]}, found {header[6]!r:.40}")
    shape: list[int] = _checked(header, 7, list)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise TransportError(f"header field shape: expected 1 to {MAX_DIMENSIONS} sizes, found {shape!r:.80}")
    return dtype, shape


def _decode_data(header: list[Any], frames: Sequence[memoryview]) -> Sequence[bytes | memoryview] | None:
    """The bytes of the rows; None where they lie in shared memory."""
    where, rest = header[8], frames[1:]
    if where is None:
        return rest
    if rest:
        raise TransportError("header field rows: expected no frames of rows beside the rows that it gives")
    return [where] if type(where) is bytes else None


def _decode_place(found: object) -> Place:
    if type(found) is not list or len(found) != 3:
        raise TransportError(f"header field rows: expected bytes or a place in shared memory, found {found!r:.80}")
    return Place(*(_count(item) for item in found))


def _found(memory: memoryview | None, where: object) -> memoryview:
    if memory is None:
        raise TransportError(f"header field rows: no such shared memory here: {where}")
    return memory


def _decode_result(replica_id: object, num_rows: object, error: object, compute_ms: object) -> SegmentResult:
    if error is not None and type(error) is not str:
        raise TransportError(f"result: expected an error in words, found {error!r:.80}")
    if type(compute_ms) is not float:
        raise TransportError(f"result: expected milliseconds as float, found {compute_ms!r:.80}")
    return SegmentResult(_replica_id(replica_id), _count(num_rows), error, compute_ms)


def _replica_id(value: object) -> str:
    if type(value) is not str:
        raise TransportError(f"replica id: expected str, found {value!r:.80}")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TransportError(f"expected a number of at least 0, found {value!r:.80}")
    return value


def _checked(header: list[Any], index: int, kind: type) -> Any:
    value = header[index]
    if type(value) is not kind:
        raise TransportError(f"header field {FIELDS[index]}: expected {kind.__name__}, found {value!r:.80}")
    return value


def _unsigned(header: list[Any], index: int) -> int:
    value: int = _checked(header, index, int)
    if value < 0:
        raise TransportError(f"header field {FIELDS[index]}: expected at least 0, found {value}")
    return value
