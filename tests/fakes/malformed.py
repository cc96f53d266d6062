"""Request bodies that are wrong in one way each, and the error that each must get."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from moe_runtime.errors import MoERuntimeError, ProtocolError, ProtocolVersionError

WIDTH = 4
ABSENT = object()


def request_map(**changes: Any) -> dict[str, Any]:
    """A good request for the layer ``vectors``, as the map that travels, with some fields changed."""
    message = {
        "protocol": [1, 2],
        "request_id": "r-1",
        "layer": "vectors",
        "inputs": tensor_map(np.ones((2, WIDTH), np.float32)),
        **changes,
    }
    return {key: value for key, value in message.items() if value is not ABSENT}


def tensor_map(array: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tobytes(), **changes}
    return {key: value for key, value in tensor.items() if value is not ABSENT}


def inputs(**changes: Any) -> bytes:
    return msgpack.packb(request_map(inputs=tensor_map(np.ones((2, WIDTH), np.float32), **changes)))


def fields(**changes: Any) -> bytes:
    return msgpack.packb(request_map(**changes))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def options(**values: Any) -> bytes:
    return msgpack.packb(request_map(options=values))


GOOD = fields()
Case = tuple[bytes, type[MoERuntimeError]]


def framing_cases() -> Iterator[tuple[str, bytes]]:
    yield "an empty body", b""
    yield "the byte that msgpack never uses", b"\xc1"
    yield "json", json.dumps({"layer": "vectors"}).encode()
    yield "protobuf", b"\x0a\x07vectors\x12\x04\x00\x00\x80\x3f"
    yield "a pickle", pickle.dumps({"layer": "vectors"})
    yield "random bytes", np.random.default_rng(7).bytes(300)
    yield "large random bytes", np.random.default_rng(8).bytes(1 << 20)
    yield "a truncated body", GOOD[:-1]
    yield "half a body", GOOD[: len(GOOD) // 2]
    yield "trailing bytes", GOOD + b"\x00"
    yield "two messages", GOOD + GOOD
    yield "a list at the top", msgpack.packb([1, 2])
    yield "a number at the top", b"\x07"
    yield "nil at the top", b"\xc0"
    yield "a 4 GiB array header", b"\xdd\xff\xff\xff\xff"
    yield "a 4 GiB map header", b"\xdf\xff\xff\xff\xff"
    yield "a 4 GiB bin header", b"\xc6\xff\xff\xff\xff"
    yield "a 4 GiB string header", b"\xdb\xff\xff\xff\xff"
    yield "deep nesting", b"\x91" * 100_000 + b"\xc0"
    yield "a megabyte of nested array headers", b"\xdd\x00\x00\x00\x40" * 200_000
    yield "a megabyte of empty arrays", b"\x81\xa1a" + b"\xdc\x00\x40" * 4 + b"\x90" * (1 << 20)
    yield "a megabyte of empty maps", b"\x81\xa1a" + b"\xdc\x00\x40" * 4 + b"\x80" * (1 << 20)
    yield "arrays beyond the most, each of them small", fields(layer=[[[0] * 8] * 8] * 8)
    yield "many keys", msgpack.packb({f"key-{i}": i for i in range(10_000)})
    yield "a key that is a number", b"\x81\x01\x02"
    yield "a key that is bytes", b"\x81\xc4\x01a\x02"
    yield "a key twice", b"\x82\xa1a\x01\xa1a\x02"
    yield "an extension type", b"\x81\xa1a\xd4\x05\x00"
    yield "an empty extension type", b"\x81\xa1a\xc7\x00\x05"
    yield "a timestamp", b"\x81\xa1a\xd6\xff\x00\x00\x00\x00"
    yield "bad utf-8", b"\x81\xa2\xc3\x28\x01"
    yield "a string above the limit", fields(layer="x" * 5000)


def field_cases() -> Iterator[tuple[str, bytes]]:
    yield "no protocol", fields(protocol=ABSENT)
    yield "a protocol that is a string", fields(protocol="1.0")
    yield "a protocol of one part", fields(protocol=[1])
    yield "a protocol of bools", fields(protocol=[True, False])
    yield "a negative minor version", fields(protocol=[1, -1])
    yield "an unknown key", fields(surprise=1)
    yield "no request id", fields(request_id=ABSENT)
    yield "an empty request id", fields(request_id="")
    yield "a long request id", fields(request_id="r" * 129)
    yield "a request id that is a number", fields(request_id=7)
    yield "a request id of two lines", fields(request_id="r\nWARNING forged")
    yield "a layer with an escape sequence", fields(layer="\x1b[2J")
    yield "a layer with a mark that turns text around", fields(layer="\u202evectors")
    yield "a task with a null", options(task="a\0b")
    yield "no layer", fields(layer=ABSENT)
    yield "a layer that is nil", fields(layer=None)
    yield "a layer that is bytes", fields(layer=b"vectors")
    yield "a long layer name", fields(layer="v" * 257)
    yield "return_routing that is a number", fields(return_routing=1)
    yield "options that are a list", fields(options=[])
    yield "an unknown option", options(surprise=1)
    yield "a task that is a number", options(task=3)
    yield "k that is a bool", options(k=True)
    yield "k that is a float", options(k=1.0)
    yield "a negative k", options(k=-1)
    yield "a k of 0", options(k=0)
    yield "k above 64 bits signed", options(k=2**63)
    yield "a negative seed", options(seed=-1)
    yield "a seed that is a float", options(seed=0.5)
    yield "isolated that is a string", options(isolated="yes")
    yield "a mask that is a list", options(mask=[True, False])


def tensor_cases() -> Iterator[tuple[str, bytes]]:
    yield "no inputs", fields(inputs=ABSENT)
    yield "inputs that are a list", fields(inputs=[1.0, 2.0])
    yield "no dtype", inputs(dtype=ABSENT)
    yield "an unknown dtype", inputs(dtype="complex64")
    yield "a dtype that is a number", inputs(dtype=1)
    yield "an object dtype", inputs(dtype="object")
    yield "no shape", inputs(shape=ABSENT)
    yield "a shape that is a number", inputs(shape=8)
    yield "a shape of nested lists", inputs(shape=nested(40))
    yield "a negative size", inputs(shape=[-2, -WIDTH])
    yield "a float size", inputs(shape=[2.0, WIDTH])
    yield "a bool size", inputs(shape=[True, 2 * WIDTH])
    yield "an overflowing shape", inputs(shape=[2**33, 2**33, 2])
    yield "no elements of a size beyond any tensor's", inputs(shape=[2**62, WIDTH, 0], data=b"")
    yield "no elements whose other sizes overflow", inputs(shape=[2**31 - 1, 2**31 - 1, 2**31 - 1, 0], data=b"")
    yield "no elements whose other sizes overflow in bytes", inputs(shape=[2**31 - 1, 2**31 - 1, 1, 0], data=b"")
    yield "a shape that overflows to the right size", inputs(shape=[2**62, 2, 2, 2, 2, WIDTH])
    yield "a long shape", inputs(shape=[1] * 8 + [2 * WIDTH])
    yield "a shape above the array limit", inputs(shape=[1] * 65)
    yield "no data", inputs(data=ABSENT)
    yield "data that is a string", inputs(data="x" * 32)
    yield "data that is a list", inputs(data=[0] * 32)
    yield "bytes short", inputs(data=b"\0" * 31)
    yield "bytes long", inputs(data=b"\0" * 33)
    yield "another dtype's label", inputs(dtype="float16")
    yield "an unknown key in a tensor", inputs(strides=[1])
    yield "a bool of 2", options(mask={"dtype": "bool", "shape": [2], "data": b"\x01\x02"})


MALFORMED: dict[str, Case] = {
    **{
        name: (body, ProtocolError)
        for cases in (framing_cases(), field_cases(), tensor_cases())
        for name, body in cases
    },
    "an unknown major version": (fields(protocol=[2, 0], inputs="anything"), ProtocolVersionError),
    "a major version of 0": (fields(protocol=[0, 9]), ProtocolVersionError),
    "a negative major version": (fields(protocol=[-1, 0]), ProtocolVersionError),
}
