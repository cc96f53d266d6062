"""The rows of a message as frames, and back: one frame of bytes, or several where one would be too long."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_runtime.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_ROWS_BYTES = 1 << 30
MAX_DIMENSIONS = 16
#: Up to here rows are copied into the header: a frame of their own would cost more, and arrive unaligned.
MAX_INLINE_BYTES = 16 << 10
#: Heartbeats travel between frames, and only a whole frame is a sign of life: a longer one would look like death.
MAX_FRAME_BYTES = 1 << 20

DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# numpy has no bfloat16.
_NUMPY_DTYPES = {dtype: np.dtype("int16" if name == "bfloat16" else name) for name, dtype in DTYPES.items()}


def check_size(what: str, num_bytes: int, max_bytes: int) -> None:
    """Raise ``TransportError`` unless so many bytes may travel."""
    if num_bytes > max_bytes:
        raise TransportError(f"{what}: {num_bytes} bytes, at most {max_bytes} can travel in one message")


def dtype_name(kind: str, ticket: int, rows: Tensor) -> str:
    """Name of the rows' dtype on the wire.

    Raises:
        TransportError: If rows of that dtype, or so many, cannot travel.
    """
    name = DTYPE_NAMES.get(rows.dtype)
    if name is None:
        raise TransportError(f"{kind} {ticket}: rows of {rows.dtype} cannot travel, only {[*DTYPES]}")
    if rows.nbytes > MAX_ROWS_BYTES:
        check_size(f"rows of {kind} {ticket}", rows.nbytes, MAX_ROWS_BYTES)
    return name


def rows_on_cpu(rows: Tensor) -> Tensor:
    """Rows whose bytes can be sent from where they are."""
    return rows if rows.is_cpu and rows.is_contiguous() else rows.detach().to("cpu").contiguous()


def encode_rows(rows: Tensor) -> list[Any]:
    """The bytes of some rows, as frames that share their memory where they are contiguous and on the CPU."""
    # numpy has no bfloat16.
    data = rows_on_cpu(rows).detach().view(torch.uint8).numpy()
    if data.nbytes <= MAX_FRAME_BYTES:
        return [data]
    flat = data.reshape(-1)
    return [flat[start : start + MAX_FRAME_BYTES] for start in range(0, flat.nbytes, MAX_FRAME_BYTES)]


def encode_inline(rows: Tensor) -> memoryview:
    """A copy of the bytes of some rows."""
    rows = rows_on_cpu(rows)
    # Through numpy it takes several times as long, and numpy has no bfloat16.
    return memoryview(ctypes.string_at(rows.data_ptr(), rows.nbytes))


def copy_rows(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rows of a shape in memory of their own, from few bytes.

    Raises:
        TransportError: If there are more or fewer bytes than the rows take.
    """
    _check_length(data.nbytes, dtype, shape)
    if not data.nbytes:
        return _empty_rows(shape, dtype)
    # Few bytes: what takes time is the number of calls into torch.
    rows = torch.from_numpy(np.ndarray(shape, _NUMPY_DTYPES[dtype], bytearray(data)))
    return rows.view(dtype) if dtype == torch.bfloat16 else rows


def decode_rows(frames: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rows of a shape from frames; they share the memory of one that is alone, writable and aligned.

    Raises:
        TransportError: If the frames have another length than the rows.
    """
    num_bytes = sum(map(len, frames))
    _check_length(num_bytes, dtype, shape)
    if num_bytes == 0:
        return _empty_rows(shape, dtype)
    if len(frames) > 1:
        return _joined(frames, num_bytes).view(dtype).view(shape)
    flat = torch.frombuffer(frames[0], dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(shape)


def _check_length(num_found: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_found != num_bytes:
        raise TransportError(f"rows: {dtype} of shape {list(shape)} are {num_bytes} bytes, the frames have {num_found}")


def _joined(frames: Sequence[memoryview], num_bytes: int) -> Tensor:
    joined = torch.empty(num_bytes, dtype=torch.uint8)
    start = 0
    for frame in frames:
        if frame:
            joined[start : start + len(frame)] = torch.frombuffer(frame, dtype=torch.uint8)
            start += len(frame)
    return joined


def _empty_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # With a size of 0 the others are bounded by nothing above, and torch refuses to multiply huge ones.
    if any(size > MAX_ROWS_BYTES for size in shape):
        raise TransportError(f"header field shape: expected sizes of at most {MAX_ROWS_BYTES}, found {[*shape]}")
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as exc:
        raise TransportError(f"header field shape: torch refuses {[*shape]}: {exc}") from exc
