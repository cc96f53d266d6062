"""Requests and replies of the data plane as frames, and back: a small msgpack header, then the rows as they are.

A message is one header frame, and one frame of rows unless it is a reply without rows. The header is a map
that carries the incarnation that sent the message, the one it is meant for, and the dtype and shape of the
rows, which are checked against the frame's length before the rows are touched. Rows are in the byte order of
the machine; routers and hosts of a runtime run on the same architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

HEADER_VERSION = 1
#: Enough for the reply to any request: the longest ids and errors for the largest number of segments.
MAX_HEADER_BYTES = 16 << 20
MAX_SEGMENTS = 2048
MAX_REPLICA_ID_CHARACTERS = 255
MAX_ROWS_BYTES = 1 << 30
MAX_DIMENSIONS = 16
MAX_ERROR_CHARACTERS = 1000
#: Frames below this are copied: they arrive unaligned, and would keep a shared receive buffer alive.
COPY_BELOW_BYTES = 16 << 10

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Address:
    """Which process a message comes from, and which it is meant for, as incarnations."""

    sender: int
    receiver: int


@dataclass(frozen=True)
class IncomingRequest:
    """A request as it was read from frames."""

    address: Address
    request: HostRequest


@dataclass(frozen=True)
class IncomingReply:
    """A reply as it was read from frames."""

    address: Address
    reply: HostReply


def check_request(request: HostRequest) -> None:
    """Raise ``TransportError`` unless the segments can travel and account for exactly the rows of a request."""
    if len(request.segments) > MAX_SEGMENTS:
        raise TransportError(
            f"request {request.ticket}: {len(request.segments)} segments, at most {MAX_SEGMENTS} can travel"
        )
    for segment in request.segments:
        if len(segment.replica_id) > MAX_REPLICA_ID_CHARACTERS:
            raise TransportError(
                f"request {request.ticket}: replica id {segment.replica_id:.40}... has "
                f"{len(segment.replica_id)} characters, at most {MAX_REPLICA_ID_CHARACTERS} can travel"
            )
    num_rows = sum(segment.num_rows for segment in request.segments)
    if request.rows.dim() < 1 or request.rows.shape[0] != num_rows:
        raise TransportError(
            f"request {request.ticket}: segments list {num_rows} rows, rows have shape {tuple(request.rows.shape)}"
        )


def check_reply(reply: HostReply) -> None:
    """Raise ``TransportError`` unless the segments without error account for exactly the rows of a reply."""
    num_rows = sum(result.num_rows for result in reply.results if result.error is None)
    found = 0 if reply.rows is None else reply.rows.shape[0] if reply.rows.dim() else -1
    if found != num_rows:
        shape = None if reply.rows is None else tuple(reply.rows.shape)
        raise TransportError(f"reply {reply.ticket}: results list {num_rows} good rows, rows have shape {shape}")


def encode_request(request: HostRequest, *, address: Address) -> list[Any]:
    """Frames of a request. They share the memory of its rows, which must not change until they are sent.

    Raises:
        TransportError: If the segments do not account for the rows, or the message exceeds a limit.
    """
    check_request(request)
    fields = {
        "segments": [[segment.replica_id, segment.num_rows] for segment in request.segments],
        "timeout_s": float(request.timeout_s),
    }
    return _encode("request", request.ticket, address, fields, request.rows)


def encode_reply(reply: HostReply, *, address: Address) -> list[Any]:
    """Frames of a reply. They share the memory of its rows, which must not change until they are sent.

    Raises:
        TransportError: If the results do not account for the rows, or the message exceeds a limit.
    """
    check_reply(reply)
    results = [
        [
            result.replica_id,
            result.num_rows,
            None if result.error is None else result.error[:MAX_ERROR_CHARACTERS],
            float(result.compute_ms),
        ]
        for result in reply.results
    ]
    return _encode("reply", reply.ticket, address, {"results": results}, reply.rows)


def decode_request(frames: Sequence[memoryview]) -> IncomingRequest:
    """The request in some frames; large rows share the memory of their frame.

    Raises:
        TransportError: If the frames are anything but a well-formed request.
    """
    header = _decode_header(frames, expected="request")
    timeout_s = _field(header, "timeout_s", float)
    if not (math.isfinite(timeout_s) and timeout_s >= 0):
        raise TransportError(f"header field timeout_s: expected a finite time of at least 0, found {timeout_s}")
    rows = _decode_rows(header, frames)
    if rows is None:
        raise TransportError("request without rows: expected two frames, found one")
    segments = tuple(_decode_segment(item) for item in _field(header, "segments", list))
    request = HostRequest(_unsigned(header, "ticket"), segments, rows, timeout_s)
    check_request(request)
    return IncomingRequest(_decode_address(header), request)


def decode_reply(frames: Sequence[memoryview]) -> IncomingReply:
    """The reply in some frames; large rows share the memory of their frame.

    Raises:
        TransportError: If the frames are anything but a well-formed reply.
    """
    header = _decode_header(frames, expected="reply")
    results = tuple(_decode_result(item) for item in _field(header, "results", list))
    reply = HostReply(_unsigned(header, "ticket"), results, _decode_rows(header, frames))
    check_reply(reply)
    return IncomingReply(_decode_address(header), reply)


def _encode(kind: str, ticket: int, address: Address, fields: dict[str, Any], rows: Tensor | None) -> list[Any]:
    header = {
        "version": HEADER_VERSION,
        "kind": kind,
        "ticket": ticket,
        "from": address.sender,
        "to": address.receiver,
        **fields,
    }
    frames: list[Any] = []
    if rows is not None:
        if rows.dtype not in _DTYPE_NAMES:
            raise TransportError(f"{kind} {ticket}: rows of {rows.dtype} cannot travel, only {[*_DTYPES]}")
        header["dtype"] = _DTYPE_NAMES[rows.dtype]
        header["shape"] = list(rows.shape)
        frames.append(rows.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
        _check_size(f"rows of {kind} {ticket}", frames[0].nbytes, MAX_ROWS_BYTES)
    packed = msgpack.packb(header)
    _check_size(f"header of {kind} {ticket}", len(packed), MAX_HEADER_BYTES)
    return [packed, *frames]


def _check_size(what: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise TransportError(f"{what}: {num_bytes} bytes, at most {max_bytes} can travel in one message")


def _decode_header(frames: Sequence[memoryview], *, expected: str) -> dict[str, Any]:
    if not 1 <= len(frames) <= 2:
        raise TransportError(f"expected a header frame and at most one frame of rows, found {len(frames)} frames")
    _check_size("header", frames[0].nbytes, MAX_HEADER_BYTES)
    try:
        header = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise TransportError(f"header is not msgpack: {exc}") from exc
    if not isinstance(header, dict):
        raise TransportError(f"header: expected a map, found {type(header).__name__}")
    version, kind = header.get("version"), header.get("kind")
    if version != HEADER_VERSION or kind != expected:
        raise TransportError(
            f"header: expected {expected} of version {HEADER_VERSION}, found {kind!r:.40} of {version!r:.40}"
        )
    return header


def _decode_address(header: dict[str, Any]) -> Address:
    return Address(sender=_unsigned(header, "from"), receiver=_unsigned(header, "to"))


def _decode_segment(item: object) -> Segment:
    if not isinstance(item, list) or len(item) != 2:
        raise TransportError(f"segment: expected [replica_id, num_rows], found {item!r:.80}")
    fields = {"replica_id": item[0], "num_rows": item[1]}
    return Segment(_field(fields, "replica_id", str), _unsigned(fields, "num_rows"))


def _decode_result(item: object) -> SegmentResult:
    if not isinstance(item, list) or len(item) != 4:
        raise TransportError(f"result: expected [replica_id, num_rows, error, compute_ms], found {item!r:.80}")
    fields = {"replica_id": item[0], "num_rows": item[1], "error": item[2], "compute_ms": item[3]}
    return SegmentResult(
        replica_id=_field(fields, "replica_id", str),
        num_rows=_unsigned(fields, "num_rows"),
        error=None if fields["error"] is None else _field(fields, "error", str),
        compute_ms=_field(fields, "compute_ms", float),
    )


def _decode_rows(header: dict[str, Any], frames: Sequence[memoryview]) -> Tensor | None:
    if len(frames) == 1:
        return None
    dtype = _DTYPES.get(_field(header, "dtype", str))
    if dtype is None:
        raise TransportError(f"header field dtype: expected one of {[*_DTYPES]}, found {header['dtype']!r:.40}")
    shape = _field(header, "shape", list)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise TransportError(f"header field shape: expected 1 to {MAX_DIMENSIONS} sizes, found {shape!r:.80}")
    data, num_bytes = frames[1], math.prod(shape) * dtype.itemsize
    if data.nbytes != num_bytes:
        raise TransportError(f"rows: {dtype} of shape {shape} are {num_bytes} bytes, the frame has {data.nbytes}")
    if num_bytes == 0:
        return _empty_rows(shape, dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if num_bytes < COPY_BELOW_BYTES or flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


def _empty_rows(shape: list[int], dtype: torch.dtype) -> Tensor:
    # With a size of 0 the others are bounded by nothing above, and torch refuses to multiply huge ones.
    if any(size > MAX_ROWS_BYTES for size in shape):
        raise TransportError(f"header field shape: expected sizes of at most {MAX_ROWS_BYTES}, found {shape}")
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as exc:
        raise TransportError(f"header field shape: torch refuses {shape}: {exc}") from exc


def _field(header: dict[str, Any], key: str, kind: type) -> Any:
    value = header.get(key)
    if type(value) is not kind:
        raise TransportError(f"header field {key}: expected {kind.__name__}, found {value!r:.80}")
    return value


def _unsigned(header: dict[str, Any], key: str) -> int:
    value: int = _field(header, key, int)
    if value < 0:
        raise TransportError(f"header field {key}: expected at least 0, found {value}")
    return value
