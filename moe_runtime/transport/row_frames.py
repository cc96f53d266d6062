"""The rows of a message as frames, and back: one frame of bytes, or several where one would be too long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_ROWS_BYTES = 1 << 30
MAX_DIMENSIONS = 16
#: Frames below this are copied: they arrive unaligned, and would keep a shared receive buffer alive.
COPY_BELOW_BYTES = 16 << 10
#: Heartbeats travel between frames, and only a whole frame is a sign of life: a longer one would look like death.
MAX_FRAME_BYTES = 1 << 18

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


def check_size(what: str, num_bytes: int, max_bytes: int) -> None:
    """Raise ``TransportError`` unless so many bytes may travel."""
    if num_bytes > max_bytes:
        raise TransportError(f"{what}: {num_bytes} bytes, at most {max_bytes} can travel in one message")


def dtype_name(what: str, rows: Tensor) -> str:
    """Name of the rows' dtype on the wire.

    Raises:
        TransportError: If rows of that dtype, or so many, cannot travel.
    """
    name = DTYPE_NAMES.get(rows.dtype)
    if name is None:
        raise TransportError(f"{what}: rows of {rows.dtype} cannot travel, only {[*DTYPES]}")
    if rows.nbytes > MAX_ROWS_BYTES:
        check_size(f"rows of {what}", rows.nbytes, MAX_ROWS_BYTES)
    return name


def encode_rows(rows: Tensor) -> list[Any]:
    """The bytes of some rows, as frames that share their memory where they are contiguous and on the CPU."""
    if rows.requires_grad or not rows.is_cpu or not rows.is_contiguous():
        rows = rows.detach().to("cpu").contiguous()
    data = rows.view(torch.uint8).numpy()
    if data.nbytes <= MAX_FRAME_BYTES:
        return [data]
    flat = data.reshape(-1)
    return [flat[start : start + MAX_FRAME_BYTES] for start in range(0, flat.nbytes, MAX_FRAME_BYTES)]


def decode_rows(frames: Sequence[memoryview], dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Rows of a shape from frames; they share the memory of a frame that is large, aligned and alone.

    Raises:
        TransportError: If the frames have another length than the rows.
    """
    num_bytes, num_found = math.prod(shape) * dtype.itemsize, sum(frame.nbytes for frame in frames)
    if num_found != num_bytes:
        raise TransportError(f"rows: {dtype} of shape {shape} are {num_bytes} bytes, the frames have {num_found}")
    if num_bytes == 0:
        return _empty_rows(shape, dtype)
    if len(frames) == 1 and num_bytes >= COPY_BELOW_BYTES:
        flat = torch.frombuffer(frames[0], dtype=torch.uint8)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(shape)
    return torch.frombuffer(_joined(frames, num_bytes), dtype=dtype).view(shape)


def _joined(frames: Sequence[memoryview], num_bytes: int) -> bytearray | memoryview:
    if len(frames) == 1:
        return bytearray(frames[0])
    # Not a bytearray, which would be filled with zeros first.
    joined = torch.empty(num_bytes, dtype=torch.uint8)
    start = 0
    for frame in frames:
        if frame.nbytes:
            joined[start : start + frame.nbytes] = torch.frombuffer(frame, dtype=torch.uint8)
            start += frame.nbytes
    return joined.numpy().data


def _empty_rows(shape: list[int], dtype: torch.dtype) -> Tensor:
    # With a size of 0 the others are bounded by nothing above, and torch refuses to multiply huge ones.
    if any(size > MAX_ROWS_BYTES for size in shape):
        raise TransportError(f"header field shape: expected sizes of at most {MAX_ROWS_BYTES}, found {shape}")
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as exc:
        raise TransportError(f"header field shape: torch refuses {shape}: {exc}") from exc
