"""The header of a data plane's message: which items it has, packing them, and reading those of a stranger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from moe_runtime.errors import TransportError
from moe_runtime.transport.row_frames import DTYPES, MAX_DIMENSIONS, check_size

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

HEADER_VERSION = 2
#: Enough for the reply to any request: the longest ids and errors for the largest number of segments.
MAX_HEADER_BYTES = 16 << 20

#: What the header's items are, in order. ``rows`` is None where they are frames of their own; their bytes; in a
#: request their place in shared memory; in a reply True where they lie in the request's place. ``timeout_s`` is the
#: request's alone.
FIELDS = ("version", "kind", "ticket", "from", "to", "segments", "dtype", "shape", "rows", "timeout_s")
#: Items that one segment takes in ``segments``: replica id and rows; in a reply also error and milliseconds.
REQUEST_ITEMS, REPLY_ITEMS = 2, 4

_NONE = type(None)
_START = (int, str, int, int, int, list)
#: Types of the items, for each way in which rows may travel, or in a reply be missing.
REQUEST_TYPES: frozenset[tuple[object, ...]] = frozenset(
    (*_START, str, list, rows, float) for rows in (bytes, list, _NONE)
)
REPLY_TYPES: frozenset[tuple[object, ...]] = frozenset(
    [*((*_START, str, list, rows, _NONE) for rows in (bytes, bool, _NONE)), (*_START, _NONE, _NONE, _NONE, _NONE)]
)

# One for all, since each brings a buffer of 256 KiB. Packing what has no hooks is one step under the interpreter's
# lock, so that threads may share it.
_PACKER = msgpack.Packer()


class Address(NamedTuple):
    """Which process a message comes from, and which it is meant for, as incarnations."""

    sender: int
    receiver: int


class Place(NamedTuple):
    """Where in shared memory the rows of a request lie, and how much room is there for those of its reply."""

    segment_id: int
    offset: int
    num_bytes: int


def pack_header(header: Sequence[object]) -> bytes:
    """The header frame.

    Raises:
        TransportError: If it is too large to travel.
    """
    packed: bytes = _PACKER.pack(header)
    if len(packed) > MAX_HEADER_BYTES:
        check_size(f"header of {header[1]} {header[2]}", len(packed), MAX_HEADER_BYTES)
    return packed


def unpack_header(frames: Sequence[memoryview], kind: str, types: Collection[tuple[object, ...]]) -> list[Any]:
    """The header's items, each of a type that the kind of message allows.

    Raises:
        TransportError: If the first frame is not the header of a message of that kind.
    """
    if not frames:
        raise TransportError("expected a header frame, found none")
    check_size("header", frames[0].nbytes, MAX_HEADER_BYTES)
    try:
        header = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise TransportError(f"header is not msgpack: {exc}") from exc
    if type(header) is not list or len(header) != len(FIELDS):
        raise TransportError(f"header: expected an array of {len(FIELDS)} items, found {header!r:.80}")
    if header[0] != HEADER_VERSION or header[1] != kind:
        found = f"{header[1]!r:.40} of {header[0]!r:.40}"
        raise TransportError(f"header: expected {kind} of version {HEADER_VERSION}, found {found}")
    # One comparison where all is well, which is nearly always; only otherwise is it worth asking what is wrong.
    if tuple(map(type, header)) not in types:
        raise _misfit(header, types)
    if header[2] < 0 or header[3] < 0 or header[4] < 0:
        raise TransportError(f"header fields ticket, from, to: expected at least 0, found {header[2:5]}")
    return header


def _misfit(header: list[Any], types: Collection[tuple[object, ...]]) -> TransportError:
    for index, (field, item) in enumerate(zip(FIELDS, header, strict=True)):
        expected = {each[index] for each in types}
        if type(item) not in expected:
            names = " or ".join(sorted(str(getattr(each, "__name__", each)) for each in expected))
            return TransportError(f"header field {field}: expected {names}, found {item!r:.80}")
    return TransportError(f"header: the fields dtype, shape and rows do not fit together: {header[6:9]!r:.80}")


def whole_segments(items: list[Any], num_items: int) -> int:
    """How many items there are, which is a whole number of segments' worth.

    Raises:
        TransportError: If it is not.
    """
    if len(items) % num_items:
        raise TransportError(f"header field segments: expected {num_items} items each, found {items!r:.80}")
    return len(items)


def check_segment(replica_id: object, num_rows: object) -> None:
    """Raise ``TransportError`` unless these are a replica's id and a number of rows."""
    if type(replica_id) is not str or type(num_rows) is not int or num_rows < 0:
        found = f"{replica_id!r:.80}, {num_rows!r:.40}"
        raise TransportError(f"header field segments: expected a replica id and a number of rows, found {found}")


def read_dtype(name: str, shape: list[Any]) -> torch.dtype:
    """The dtype of a name, after a look at the shape that comes with it.

    Raises:
        TransportError: If there is no such dtype, or the shape has other things than sizes.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise TransportError(f"header field dtype: expected one of {[*DTYPES]}, found {name!r:.40}")
    if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise TransportError(f"header field shape: expected 1 to {MAX_DIMENSIONS} sizes, found {shape!r:.80}")
    return dtype


def read_place(found: list[Any]) -> Place:
    """The place in shared memory that a request names.

    Raises:
        TransportError: If it is none.
    """
    if len(found) != 3 or any(type(number) is not int or number < 0 for number in found):
        raise TransportError(f"header field rows: expected bytes or a place in shared memory, found {found!r:.80}")
    return Place(*found)


def found_memory(memory: memoryview | None, where: object) -> list[memoryview]:
    """Shared memory as the bytes of rows.

    Raises:
        TransportError: If there is none.
    """
    if memory is None:
        raise TransportError(f"header field rows: no such shared memory here: {where}")
    return [memory]


def rows_data(where: Any, frames: Sequence[memoryview]) -> Sequence[bytes | memoryview]:
    """The bytes of the rows: those of the frames after the header, unless the header gives them.

    Raises:
        TransportError: If both do.
    """
    if where is None:
        return frames[1:]
    if len(frames) > 1 or where is False:
        raise TransportError("header field rows: expected no frames of rows beside the rows that it gives")
    return [where] if type(where) is bytes else where
