"""Tensors keep every bit on the wire, whichever library they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_runtime.errors import DTypeError, ProtocolError
from moe_runtime.wire.messages import WireTensor
from moe_runtime.wire.tensors import NUMPY_DTYPES, WIRE_DTYPES, checked_tensor, from_numpy, num_bytes, to_numpy
from moe_runtime.wire.torch_tensors import TORCH_DTYPES, from_torch, to_torch


def over_the_wire(tensor: WireTensor) -> WireTensor:
    return checked_tensor(tensor.dtype, list(tensor.shape), bytes(tensor.data), where="inputs")


@given(
    st.sampled_from(NUMPY_DTYPES).flatmap(
        lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    )
)
def test_every_numpy_array_survives_bit_for_bit(array: np.ndarray) -> None:
    back = to_numpy(over_the_wire(from_numpy(array)))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", WIRE_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)])
def test_every_torch_dtype_survives(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(TORCH_DTYPES[name])
    back = to_torch(over_the_wire(from_torch(tensor)))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_bytes_are_row_major_and_little_endian() -> None:
    tensor = from_numpy(np.array([[1, 2], [3, 4]], np.int16))
    assert bytes(tensor.data).hex() == "0100020003000400"


def test_big_endian_and_strided_arrays_are_put_in_order() -> None:
    swapped = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert to_numpy(from_numpy(swapped)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_contiguous_array_is_not_copied() -> None:
    array = np.zeros(4, np.float32)
    tensor = from_numpy(array)
    array[0] = 1
    assert to_numpy(tensor)[0] == 1


def test_contiguous_torch_tensor_is_not_copied() -> None:
    source = torch.zeros(4)
    tensor = from_torch(source)
    source[0] = 1
    assert to_numpy(tensor)[0] == 1


def test_received_torch_tensor_can_be_written_to_without_changing_the_message() -> None:
    message = bytes(8)
    to_torch(WireTensor("float32", (2,), message)).add_(1)
    assert message == bytes(8)


def test_received_numpy_array_is_read_only() -> None:
    for dtype in ("float32", "bfloat16"):
        array = to_numpy(WireTensor(dtype, (1,), bytes(WIRE_DTYPES[dtype].itemsize)))
        assert not array.flags.writeable


def test_transposed_torch_tensor_is_put_in_order() -> None:
    assert to_torch(from_torch(torch.arange(6).reshape(2, 3).T)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_torch_tensor_with_a_gradient_travels_without_it() -> None:
    assert not to_torch(from_torch(torch.ones(2, requires_grad=True))).requires_grad


def test_bfloat16_becomes_the_same_float32_in_numpy() -> None:
    values = torch.tensor([1.0, -2.5, 3.0e38, float("inf"), 0.0]).bfloat16()
    floats = to_numpy(from_torch(values))
    assert floats.dtype == np.float32
    assert floats.tolist() == values.float().tolist()


def test_dtype_that_the_wire_lacks_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(DTypeError, match=r"float32.*found dtype complex64"):
        from_numpy(np.zeros(2, np.complex64))
    with pytest.raises(DTypeError, match=r"bfloat16.*found torch.complex64"):
        from_torch(torch.zeros(2, dtype=torch.complex64))


def test_size_in_bytes_does_not_overflow() -> None:
    assert num_bytes("float64", (2**40, 2**40)) == 2**83


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("float128", [1], b"", "inputs.dtype: expected one of float32"),
        (["float32"], [1], b"", r"inputs.dtype: .* found \['float32'\]"),
        ("float32", [1] * 9, b"", "list of at most 8 sizes"),
        ("float32", (1,), bytes(4), "inputs.shape: expected a list"),
        ("float32", [2**300], b"", "found .a number above"),
        ("float32", [True], bytes(4), "integers of 0 to 2147483647, found .True."),
        ("float32", [2], bytes(4), r"float32 of shape \[2\] takes 8 bytes, found 4"),
        ("float32", [1], "abcd", "inputs.data: expected bytes, found str"),
        ("x" * 500, [1], b"", r"found 'x+\.\.\."),
        ({}, [1], b"", "found dict"),
    ],
)
def test_tensor_that_is_wrong_is_refused_in_words(dtype: object, shape: object, data: object, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        checked_tensor(dtype, shape, data, where="inputs")


@pytest.mark.parametrize(("dtype", "small"), [("float32", 2**28 - 1), ("bfloat16", 2**29 - 1), ("int8", 2**30)])
def test_a_tensor_without_elements_claims_no_more_than_numpy_can_hold(dtype: str, small: int) -> None:
    shape = [2**31 - 1, small, 1, 0]
    assert to_numpy(checked_tensor(dtype, shape, b"", where="inputs")).shape == tuple(shape)
    with pytest.raises(ProtocolError, match="expected sizes whose product is a tensor's"):
        checked_tensor(dtype, [2**31 - 1, 2**31 - 1, 4, 0], b"", where="inputs")
