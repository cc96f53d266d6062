"""The header of a data plane's message: which items it has, writing them, and reading those of a stranger.

A header is a msgpack array. One call of msgspec reads it into the values that the service works with, and checks
every type and range on the way.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, Literal, TypeVar

import msgspec

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import NaturalNumber, Segment, SegmentResult
from moe_runtime.transport.row_frames import DTYPES, MAX_DIMENSIONS, check_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

HEADER_VERSION: Final = 6
MAX_SEGMENTS = 2048
MAX_REQUEST_IDS = 4096
MAX_REQUEST_ID_CHARACTERS = 255
#: Enough for the reply to any request: the longest ids and errors for the largest number of segments.
MAX_HEADER_BYTES = 16 << 20

_Shape = Annotated[tuple[NaturalNumber, ...], msgspec.Meta(min_length=1, max_length=MAX_DIMENSIONS)]
_RequestIds = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=MAX_REQUEST_ID_CHARACTERS)], ...],
    msgspec.Meta(max_length=MAX_REQUEST_IDS),
]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e300)]


class Address(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Which process a message comes from, and which it is meant for, as incarnations."""

    sender: NaturalNumber
    receiver: NaturalNumber


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Where in shared memory the rows of a request lie, and how much room is there for those of its reply."""

    segment_id: NaturalNumber
    offset: NaturalNumber
    num_bytes: NaturalNumber


class RequestHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A request's header.

    Attributes:
        version: Of the format.
        kind: Tells it from a reply's.
        ticket: The request's.
        address: From whom to whom.
        segments: The request's.
        dtype: Name of the rows' dtype.
        shape: Of the rows.
        rows: Their bytes; their place in shared memory; None where they are frames of their own.
        timeout_s: The request's.
        request_ids: The request's.
        is_suspect: The request's.
    """

    version: Literal[6]
    kind: Literal["request"]
    ticket: NaturalNumber
    address: Address
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(max_length=MAX_SEGMENTS)]
    dtype: str
    shape: _Shape
    rows: memoryview | Place | None
    timeout_s: _Seconds
    request_ids: _RequestIds
    is_suspect: bool


class ReplyHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A reply's header; where the reply has no rows, ``dtype``, ``shape`` and ``rows`` are None.

    Attributes:
        version: Of the format.
        kind: Tells it from a request's.
        ticket: The request's.
        address: From whom to whom.
        results: The reply's.
        dtype: Name of the rows' dtype.
        shape: Of the rows.
        rows: Their bytes; True where they lie in the request's place; None where they are frames of their own.
        is_begun: The reply's.
    """

    version: Literal[6]
    kind: Literal["reply"]
    ticket: NaturalNumber
    address: Address
    results: Annotated[tuple[SegmentResult, ...], msgspec.Meta(max_length=MAX_SEGMENTS)]
    dtype: str | None
    shape: _Shape | None
    rows: memoryview | bool | None
    is_begun: bool


HeaderT = TypeVar("HeaderT", RequestHeader, ReplyHeader)
# Its buffer holds few rows; it grows for long headers, and is let go again.
_ENCODER = msgspec.msgpack.Encoder()
#: Where in a header msgspec found a mistake, at the end of its message.
_AT_ITEM = re.compile(r" - at `\$\[(\d+)\]")


class HeaderReader(Generic[HeaderT]):
    """Reads the headers of one kind of message."""

    def __init__(self, header_type: type[HeaderT], *, kind: str) -> None:
        self._fields = header_type.__struct_fields__
        self._kind = kind
        self._decode: Callable[[bytes | memoryview], HeaderT] = msgspec.msgpack.Decoder(header_type).decode

    def read(self, frames: Sequence[bytes | memoryview]) -> HeaderT:
        """The header that comes first among some frames; bytes in it share the memory of its frame.

        Raises:
            TransportError: If the first frame is not the header of a message of this kind.
        """
        if not frames:
            raise TransportError("expected a header frame, found none")
        frame = frames[0]
        if len(frame) > MAX_HEADER_BYTES:
            check_size("header", len(frame), MAX_HEADER_BYTES)
        try:
            return self._decode(frame)
        except msgspec.ValidationError as exc:
            raise TransportError(self._explain(str(exc))) from exc
        except (ValueError, RecursionError) as exc:
            raise TransportError(f"header is not msgpack: {exc}") from exc

    def _explain(self, mistake: str) -> str:
        at_item = _AT_ITEM.search(mistake)
        field = None if at_item is None else self._fields[int(at_item[1])]
        if field is None or field in {"version", "kind"}:
            return f"header: expected {self._kind} of version {HEADER_VERSION}: {mistake}"
        return f"header field {field}: {mistake}"


def pack_header(header: RequestHeader | ReplyHeader) -> bytes:
    """The header frame.

    Raises:
        TransportError: If it is too large to travel.
    """
    packed = _ENCODER.encode(header)
    if len(packed) > MAX_HEADER_BYTES:
        check_size(f"header of {header.kind} {header.ticket}", len(packed), MAX_HEADER_BYTES)
    return packed


def read_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        TransportError: If there is no such dtype.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise TransportError(f"header field dtype: expected one of {[*DTYPES]}, found {name!r:.40}")
    return dtype


def found_memory(memory: memoryview | None, where: object) -> memoryview:
    """Shared memory as the bytes of rows.

    Raises:
        TransportError: If there is none.
    """
    if memory is None:
        raise TransportError(f"header field rows: no such shared memory here: {where}")
    return memory


def no_more_frames(frames: Sequence[Any]) -> None:
    """Raise ``TransportError`` if there are frames after the header, which gives the rows already."""
    if len(frames) > 1:
        raise TransportError("header field rows: expected no frames of rows beside the rows that it gives")
