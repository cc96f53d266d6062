"""Tensors as (dtype, shape, bytes): the protocol's dtypes, the checks on what arrives, and numpy on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.errors import DTypeError, ProtocolError
from moe_runtime.wire.messages import WireTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class WireDType:
    """How one dtype of the protocol lies in memory.

    Attributes:
        itemsize: Bytes per element.
        numpy: Little-endian numpy dtype of the same layout; None where numpy has none.
    """

    itemsize: int
    numpy: np.dtype[Any] | None


WIRE_DTYPES = {
    "float32": WireDType(4, np.dtype("<f4")),
    "float64": WireDType(8, np.dtype("<f8")),
    "float16": WireDType(2, np.dtype("<f2")),
    "bfloat16": WireDType(2, None),
    "int8": WireDType(1, np.dtype("i1")),
    "int16": WireDType(2, np.dtype("<i2")),
    "int32": WireDType(4, np.dtype("<i4")),
    "int64": WireDType(8, np.dtype("<i8")),
    "uint8": WireDType(1, np.dtype("u1")),
    "bool": WireDType(1, np.dtype("?")),
}
MAX_DIMS = 8
#: A tensor without elements may claim any sizes; beyond these, no library could hold its shape. In bytes, as numpy
#: counts, and half of what it can hold: bfloat16 takes twice its bytes there.
MAX_SIZE = 2**31 - 1
MAX_BYTES_OF_NONZERO_SIZES = 2**62 - 1


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes, in Python integers, which do not overflow."""
    total = WIRE_DTYPES[dtype].itemsize
    for size in shape:
        total *= size
    return total


def checked_tensor(dtype: object, shape: object, data: object, *, where: str) -> WireTensor:
    """A ``WireTensor`` made of three values that came from a peer.

    Args:
        dtype: Should be one of ``WIRE_DTYPES``.
        shape: Should be a list of at most ``MAX_DIMS`` integers of 0 to ``MAX_SIZE``.
        data: Should be exactly as many bytes as dtype and shape say; those of a bool 0 or 1.
        where: Name of the tensor, for messages.

    Raises:
        ProtocolError: If one of them is not.
    """
    if not isinstance(dtype, str) or dtype not in WIRE_DTYPES:
        raise ProtocolError(f"{where}.dtype: expected one of {', '.join(WIRE_DTYPES)}, found {_brief(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ProtocolError(f"{where}.shape: expected a list of at most {MAX_DIMS} sizes, found {_brief(shape)}")
    # type() and not isinstance(): True is an int to Python, and no size
    if any(type(size) is not int or not 0 <= size <= MAX_SIZE for size in shape):
        raise ProtocolError(f"{where}.shape: expected integers of 0 to {MAX_SIZE}, found {_brief(shape)}")
    if num_bytes(dtype, [size for size in shape if size]) > MAX_BYTES_OF_NONZERO_SIZES:
        raise ProtocolError(f"{where}.shape: expected sizes whose product is a tensor's, found {_brief(shape)}")
    if not isinstance(data, bytes):
        raise ProtocolError(f"{where}.data: expected bytes, found {type(data).__name__}")
    expected = num_bytes(dtype, shape)
    if len(data) != expected:
        raise ProtocolError(
            f"{where}.data: {dtype} of shape {_brief(shape)} takes {_brief(expected)} bytes, found {len(data)}"
        )
    if dtype == "bool" and data and np.frombuffer(data, np.uint8).max() > 1:
        raise ProtocolError(f"{where}.data: expected bytes of 0 or 1 in a bool tensor, found others")
    return WireTensor(dtype=dtype, shape=tuple(shape), data=data)


def from_numpy(array: NDArray[Any]) -> WireTensor:
    """The array as it travels; shares the array's memory where it is contiguous and little-endian.

    Raises:
        DTypeError: If the protocol has no such dtype.
    """
    wire_dtype = WIRE_DTYPES.get(array.dtype.name)
    if wire_dtype is None or wire_dtype.numpy is None:
        raise DTypeError(f"expected a numpy array of {', '.join(NUMPY_DTYPES)}, found dtype {array.dtype}")
    flat = np.ascontiguousarray(array, dtype=wire_dtype.numpy).reshape(-1)
    return WireTensor(dtype=array.dtype.name, shape=array.shape, data=flat.view(np.uint8).data)


def to_numpy(tensor: WireTensor) -> NDArray[Any]:
    """The tensor as numpy, read-only and sharing its bytes; bfloat16, which numpy lacks, as float32."""
    dtype = WIRE_DTYPES[tensor.dtype].numpy
    if dtype is not None:
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    upper_halves = np.frombuffer(tensor.data, "<u2").astype("<u4")
    floats = (upper_halves << 16).view("<f4").reshape(tensor.shape)
    floats.setflags(write=False)
    return floats


NUMPY_DTYPES = tuple(name for name, dtype in WIRE_DTYPES.items() if dtype.numpy is not None)


def _brief(value: object) -> str:
    """A value that a peer chose, short enough for a message."""
    if type(value) is int and value.bit_length() > 128:
        return "a number above 2**128"  # printing it could take longer than refusing it
    if isinstance(value, list):
        # Nested lists by their name: a peer chooses how deep they are.
        shown = ("list" if isinstance(item, list) else _brief(item) for item in value[: MAX_DIMS + 1])
        return f"[{', '.join(shown)}]"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
