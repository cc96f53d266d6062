"""Frames of a stranger: anything but a message is a transport error that says what is wrong."""

import contextlib
import math

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given

from fakes.headers import REPLY_FIELDS, REQUEST_FIELDS, reply_frames, request_frames, views
from moe_runtime.errors import TransportError
from moe_runtime.service.ports import MAX_REPLICA_ID_CHARACTERS
from moe_runtime.transport.header import (
    decode_reply,
    decode_request,
)
from moe_runtime.transport.header_fields import (
    MAX_HEADER_BYTES,
    MAX_SEGMENTS,
)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "expected a header frame"),
        (request_frames() + request_frames(), "expected no frames of rows beside"),
        (request_frames(rows=None), "are 24 bytes, the frames have 0"),
        (views([b"\xc1", b""]), "not msgpack"),
        (views([b"\x93\x01", b""]), "expected request of version 6: Expected `array` of at least length 11, got 3"),
        (views([b"\x91" * 100_000, b""]), "at least length 11, got 1"),
        (views([b"\x9b\x06" + b"\x91" * 100_000]), "request of version 6: Expected `str`, got `array`"),
        (views([bytes(request_frames()[0]) + b"x"]), "not msgpack: .*trailing"),
        (views([bytes(request_frames()[0])[:-1]]), "not msgpack: .*truncated"),
        (views([msgpack.packb([1, 2]), b""]), "at least length 11, got 2"),
        (
            views([msgpack.packb([6, "request", 5, [1, 1], [], "float32", [0], None, 1.0, [], False, 0])]),
            "at most length 11, got 12",
        ),
        (views([msgpack.packb({"version": 6}), b""]), "request of version 6: Expected `array`, got `object`"),
        (views([msgpack.packb({1: 2}), b""]), "request of version 6: Expected `array`, got `object`"),
        (views([b"\x80" * (MAX_HEADER_BYTES + 1), b""]), "header: .* bytes, at most"),
        (request_frames(version=2), "expected request of version 6: Invalid enum value 2"),
        (request_frames(kind="reply"), "expected request of version 6: Invalid enum value 'reply'"),
        (views([bytes(request_frames()[0]).replace(b"request", b"re\xff\xfest")]), "not msgpack: .*utf-8"),
        (request_frames(ticket=-1), "ticket: Expected `int` >= 0"),
        (request_frames(ticket=None), "ticket: Expected `int`, got `None`"),
        (request_frames(ticket=True), "ticket: Expected `int`, got `bool`"),
        (request_frames(ticket=1.0), "ticket: Expected `int`, got `float`"),
        (request_frames(address=[1, "you"]), r"address: Expected `int`, got `str` - at `\$\[3\]\[1\]`"),
        (request_frames(address=[-1, 1]), "address: Expected `int` >= 0"),
        (request_frames(address=[1]), "address: Expected `array` of at least length 2, got 1"),
        (request_frames(address=[1, 2, 3]), "address: Expected `array` of at most length 2, got 3"),
        (request_frames(timeout_s="1"), "timeout_s: Expected `float`, got `str`"),
        (request_frames(timeout_s=math.nan), "timeout_s: Expected `float` >= 0.0"),
        (request_frames(timeout_s=math.inf), "timeout_s: Expected `float` <= "),
        (request_frames(timeout_s=-0.5), "timeout_s: Expected `float` >= 0.0"),
        (request_frames(segments="ab"), "segments: Expected `array`, got `str`"),
        (request_frames(segments=[["a"]]), "segments: Expected `array` of at least length 2, got 1"),
        (request_frames(segments=[["a", 3, 3]]), "segments: Expected `array` of at most length 2, got 3"),
        (request_frames(segments=[["a", -3]]), "segments: Expected `int` >= 0"),
        (request_frames(segments=[["a", True]]), "segments: Expected `int`, got `bool`"),
        (request_frames(segments=[[3, 3]]), r"segments: Expected `str`, got `int` - at `\$\[4\]\[0\]\[0\]`"),
        (request_frames(segments=[["a", 4]]), "segments list 4 rows"),
        (request_frames(segments=[["a" * (MAX_REPLICA_ID_CHARACTERS + 1), 3]]), "segments: .*length <= 255"),
        (request_frames(segments=[["a", 0]] * (MAX_SEGMENTS + 1)), "segments: .*length <= 2048"),
        (request_frames(dtype="object"), "dtype: expected one of"),
        (request_frames(dtype=3), "dtype: Expected `str`"),
        (request_frames(shape=[]), "shape: Expected `array` of length >= 1"),
        (request_frames(shape=[3] + [1] * 16), "shape: Expected `array` of length <= 16"),
        (request_frames(shape=[3, -2]), "shape: Expected `int` >= 0"),
        (request_frames(shape=[3, 2.0]), "shape: Expected `int`, got `float`"),
        (request_frames(shape=[3, 3]), "are 36 bytes, the frames have 24"),
        (request_frames(shape=[3, 2**63, 2**63]), "the frames have 24"),
        (request_frames(rows=b"", shape=[0, 2**63], segments=[]), "sizes of at most"),
        (request_frames(rows=b"", shape=[0, *[2**30] * 4], segments=[]), "torch refuses"),
        (request_frames(rows=b""), "the frames have 0"),
        (request_frames(rows="abc"), r"rows: Expected `bytes \| array \| null`, got `str`"),
        (request_frames(rows=[1, 2]), "rows: Expected `array` of at least length 3, got 2"),
        (request_frames(rows=[1, -2, 3]), "rows: Expected `int` >= 0"),
        (request_frames(rows=[1, 0, 24]), "no such shared memory here"),
        (request_frames(rows=[1, 0, 24]) + views([b"x"]), "expected no frames of rows beside"),
    ],
)
def test_frames_that_are_no_request_are_a_transport_error(frames, message):
    with pytest.raises(TransportError, match=message):
        decode_request(frames)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (request_frames(), "expected reply of version 6"),
        (reply_frames(kind="request"), "expected reply of version 6: Invalid enum value 'request'"),
        (reply_frames(dtype=None, shape=None, rows=None), "results list 2 rows, rows have shape None"),
        (reply_frames(dtype=None), "dtype, shape and rows do not fit together"),
        (reply_frames(shape=None, results=[]), "dtype, shape and rows do not fit together"),
        (reply_frames(shape=None, dtype=None, results=[]), "dtype, shape and rows do not fit together"),
        (
            reply_frames(shape=None, dtype=None, rows=None, results=[]) + views([b"x"]),
            "expected no frames of rows beside",
        ),
        (reply_frames(rows=False), "rows: expected bytes, true or null, found false"),
        (reply_frames(results=[["a", 2, None, 1.0, 5]]), "results: Expected `array`, got `int`"),
        (
            reply_frames(results=[["a", 2, None, 1.0, [], False, 5]]),
            "results: Expected `array` of at most length 6, got 7",
        ),
        (reply_frames(results=[["a", 2, None, 1.0, [0]]]), "expected an error and some of its 2 rows"),
        (reply_frames(results=[["a", 2, "bad", 1.0, [0, 1]]]), "expected an error and some of its 2 rows"),
        (reply_frames(results=[["a", 2, "bad", 1.0, [2]]]), "expected an error and some of its 2 rows"),
        (reply_frames(results=[["a", 2, "bad", 1.0, [0, 0]]]), "expected an error and some of its 2 rows"),
        (reply_frames(results=[["a", 2, "bad", 1.0, [-1]]]), "results: Expected `int` >= 0"),
        (reply_frames(results=[["a", 2, 3, 0.0]]), "results: Expected `str | null`, got `int`"),
        (reply_frames(results=[["a", 2, None, "fast"]]), "results: Expected `float`, got `str`"),
        (reply_frames(results=[["a", 3, None, 0.0]]), "results list 3 rows"),
        (reply_frames(results=[["a", 0, None, 0.0]] * (MAX_SEGMENTS + 1)), "results: .*length <= 2048"),
        (reply_frames(rows=None), "the frames have 0"),
        (reply_frames(rows=1), r"rows: Expected `bool \| bytes \| null`, got `int`"),
        (reply_frames(rows=True), "no such shared memory here: 5"),
        (reply_frames() + views([b"x"]), "expected no frames of rows beside"),
    ],
)
def test_frames_that_are_no_reply_are_a_transport_error(frames, message):
    with pytest.raises(TransportError, match=message):
        decode_reply(frames)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.binary(max_size=64), max_size=3))
def test_no_bytes_cause_anything_but_a_transport_error(frames):
    for decode in (decode_request, decode_reply):
        with pytest.raises(TransportError):
            decode(views(frames))


@given(st.sampled_from(REQUEST_FIELDS), VALUES)
def test_no_request_header_causes_anything_but_a_transport_error(key, value):
    with contextlib.suppress(TransportError):
        decode_request(request_frames(**{key: value}))


@given(st.sampled_from(REPLY_FIELDS), VALUES)
def test_no_reply_header_causes_anything_but_a_transport_error(key, value):
    with contextlib.suppress(TransportError):
        decode_reply(reply_frames(**{key: value}))


@pytest.mark.parametrize("position", range(0, 120, 7))
def test_flipped_bits_cause_nothing_but_a_transport_error(position):
    (header,) = request_frames()
    header[position % len(header)] ^= 0xFF
    with contextlib.suppress(TransportError):
        decode_request([header])
