import contextlib
import math

import hypothesis.strategies as st
import msgpack
import pytest
import torch
from hypothesis import given, settings

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import MAX_REPLICA_ID_CHARACTERS, HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.header import (
    MAX_ERROR_CHARACTERS,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from moe_runtime.transport.header_fields import (
    MAX_HEADER_BYTES,
    MAX_SEGMENTS,
    Address,
    Place,
    ReplyHeader,
    RequestHeader,
)
from moe_runtime.transport.row_frames import MAX_FRAME_BYTES, MAX_INLINE_BYTES

REQUEST_FIELDS = RequestHeader.__struct_fields__
REPLY_FIELDS = ReplyHeader.__struct_fields__
ADDRESS = Address(sender=2**64 - 1, receiver=1)
REQUEST = HostRequest(5, (Segment("a/b/0", 2), Segment("a/c/0", 1)), torch.arange(6.0).reshape(3, 2), 0.25)
REPLY = HostReply(
    5, (SegmentResult("a/b/0", 2, None, 1.5), SegmentResult("a/c/0", 1, "it raised", 0.0)), torch.ones(2, 4)
)


def views(frames):
    return [memoryview(bytearray(frame)) for frame in frames]


def request_frames(**changes):
    """The frames of ``REQUEST``, with fields of its header changed."""
    (header,) = encode_request(REQUEST, address=ADDRESS)
    return _changed(header, REQUEST_FIELDS, changes)


def reply_frames(**changes):
    (header,) = encode_reply(REPLY, address=ADDRESS)
    return _changed(header, REPLY_FIELDS, changes)


def _changed(header, names, changes):
    fields = dict(zip(names, msgpack.unpackb(header), strict=True))
    assert fields.keys() >= changes.keys()
    return views([msgpack.packb([*(fields | changes).values()])])


def test_few_rows_are_part_of_the_header():
    (header,) = encode_request(REQUEST, address=ADDRESS)
    assert dict(zip(REQUEST_FIELDS, msgpack.unpackb(header), strict=True)) == {
        "version": 3,
        "kind": "request",
        "ticket": 5,
        "address": [2**64 - 1, 1],
        "segments": [["a/b/0", 2], ["a/c/0", 1]],
        "dtype": "float32",
        "shape": [3, 2],
        "rows": torch.arange(6.0).numpy().tobytes(),
        "timeout_s": 0.25,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_a_frame_of_their_own(dtype):
    rows = torch.zeros(1, MAX_INLINE_BYTES // dtype.itemsize + 1, dtype=dtype)
    header, data = encode_request(HostRequest(1, (Segment("a", 1),), rows, 1.0), address=ADDRESS)
    assert msgpack.unpackb(header)[REQUEST_FIELDS.index("rows")] is None
    assert data.nbytes == rows.nbytes
    assert torch.equal(decode_request(views([header, data])).request.rows, rows)


def test_request_is_read_as_it_was_written():
    incoming = decode_request(request_frames())
    assert incoming.address == ADDRESS
    assert incoming.request.ticket == 5
    assert incoming.request.segments == REQUEST.segments
    assert incoming.request.timeout_s == 0.25
    assert torch.equal(incoming.request.rows, REQUEST.rows)


def test_reply_is_read_as_it_was_written():
    incoming = decode_reply(reply_frames())
    assert incoming.address == ADDRESS
    assert incoming.reply.ticket == 5
    assert incoming.reply.results == REPLY.results
    assert torch.equal(incoming.reply.rows, REPLY.rows)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_and_bool_travel(dtype):
    rows = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    frames = encode_request(HostRequest(1, (Segment("a", 2),), rows, 1.0), address=ADDRESS)
    assert torch.equal(decode_request(views(frames)).request.rows, rows)


def test_rows_of_a_frame_share_its_memory():
    rows = torch.zeros(1, MAX_INLINE_BYTES + 1, dtype=torch.uint8)
    frames = views(encode_request(HostRequest(1, (Segment("a", 1),), rows, 1.0), address=ADDRESS))
    read = decode_request(frames).request.rows
    frames[1][0] = 7
    assert read[0, 0].item() == 7


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_rows_are_aligned_wherever_their_frame_lies(offset):
    rows = torch.arange(4097.0, dtype=torch.float64).reshape(1, -1)
    header, data = encode_request(HostRequest(1, (Segment("a", 1),), rows, 1.0), address=ADDRESS)
    moved = memoryview(bytearray(b"\0" * offset + bytes(data)))[offset:]
    read = decode_request([memoryview(header), moved]).request.rows
    assert read.data_ptr() % 8 == 0
    assert torch.equal(read, rows)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "expected a header frame"),
        (request_frames() + request_frames(), "expected no frames of rows beside"),
        (request_frames(rows=None), "are 24 bytes, the frames have 0"),
        (views([b"\xc1", b""]), "not msgpack"),
        (views([b"\x93\x01", b""]), "expected request of version 3: Expected `array` of at least length 9, got 3"),
        (views([b"\x91" * 100_000, b""]), "at least length 9, got 1"),
        (views([b"\x99\x03" + b"\x91" * 100_000]), "request of version 3: Expected `str`, got `array`"),
        (views([bytes(request_frames()[0]) + b"x"]), "not msgpack: .*trailing"),
        (views([bytes(request_frames()[0])[:-1]]), "not msgpack: .*truncated"),
        (views([msgpack.packb([1, 2]), b""]), "at least length 9, got 2"),
        (
            views([msgpack.packb([3, "request", 5, [1, 1], [], "float32", [0], None, 1.0, 0])]),
            "at most length 9, got 10",
        ),
        (views([msgpack.packb({"version": 3}), b""]), "request of version 3: Expected `array`, got `object`"),
        (views([msgpack.packb({1: 2}), b""]), "request of version 3: Expected `array`, got `object`"),
        (views([b"\x80" * (MAX_HEADER_BYTES + 1), b""]), "header: .* bytes, at most"),
        (request_frames(version=2), "expected request of version 3: Invalid enum value 2"),
        (request_frames(kind="reply"), "expected request of version 3: Invalid enum value 'reply'"),
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
        (request_frames(), "expected reply of version 3"),
        (reply_frames(kind="request"), "expected reply of version 3: Invalid enum value 'request'"),
        (reply_frames(dtype=None, shape=None, rows=None), "results list 2 good rows, rows have shape None"),
        (reply_frames(dtype=None), "dtype, shape and rows do not fit together"),
        (reply_frames(shape=None, results=[]), "dtype, shape and rows do not fit together"),
        (reply_frames(shape=None, dtype=None, results=[]), "dtype, shape and rows do not fit together"),
        (
            reply_frames(shape=None, dtype=None, rows=None, results=[]) + views([b"x"]),
            "expected no frames of rows beside",
        ),
        (reply_frames(rows=False), "rows: expected bytes, true or null, found false"),
        (reply_frames(results=[["a", 2, None, 1.0, 5]]), "results: Expected `array` of at most length 4, got 5"),
        (reply_frames(results=[["a", 2, 3, 0.0]]), "results: Expected `str | null`, got `int`"),
        (reply_frames(results=[["a", 2, None, "fast"]]), "results: Expected `float`, got `str`"),
        (reply_frames(results=[["a", 3, None, 0.0]]), "results list 3 good rows"),
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


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=3))
def test_no_bytes_cause_anything_but_a_transport_error(frames):
    for decode in (decode_request, decode_reply):
        with pytest.raises(TransportError):
            decode(views(frames))


@settings(deadline=None)
@given(st.sampled_from(REQUEST_FIELDS), VALUES)
def test_no_request_header_causes_anything_but_a_transport_error(key, value):
    with contextlib.suppress(TransportError):
        decode_request(request_frames(**{key: value}))


@settings(deadline=None)
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


def test_request_with_a_place_is_a_header_only_and_is_read_from_there():
    place = Place(2**64 - 1, 4096, 64)
    memory = bytearray(REQUEST.rows.numpy().tobytes() + bytes(40))
    frames = views(encode_request(REQUEST, address=ADDRESS, place=place))
    assert len(frames) == 1
    incoming = decode_request(frames, find={place: memoryview(memory)}.get)
    assert incoming.place == place
    assert torch.equal(incoming.request.rows, REQUEST.rows)
    with pytest.raises(TransportError, match="are 24 bytes, the frames have 23"):
        decode_request(frames, find={place: memoryview(memory)[:23]}.get)


def test_placed_reply_is_read_from_the_slot_of_its_ticket():
    memory = bytearray(REPLY.rows.numpy().tobytes())
    frames = views(encode_reply(REPLY, address=ADDRESS, is_placed=True))
    assert len(frames) == 1
    asked = []

    def find(ticket, num_bytes):
        asked.append((ticket, num_bytes))
        return memoryview(memory)

    assert torch.equal(decode_reply(frames, find=find).reply.rows, REPLY.rows)
    assert asked == [(5, 32)]


def test_rows_too_long_for_one_frame_travel_in_several():
    rows = torch.arange(2 * MAX_FRAME_BYTES + 3, dtype=torch.int32).to(torch.uint8).reshape(1, -1)
    frames = views(encode_request(HostRequest(1, (Segment("a", 1),), rows, 1.0), address=ADDRESS))
    assert [frame.nbytes for frame in frames[1:]] == [MAX_FRAME_BYTES, MAX_FRAME_BYTES, 3]
    assert torch.equal(decode_request(frames).request.rows, rows)
    with pytest.raises(TransportError, match="the frames have"):
        decode_request(frames[:-1])


def test_rows_of_a_dtype_that_cannot_travel_are_a_transport_error():
    rows = torch.zeros(1, 2, dtype=torch.complex64)
    with pytest.raises(TransportError, match="complex64 cannot travel"):
        encode_request(HostRequest(1, (Segment("a", 1),), rows, 1.0), address=ADDRESS)


def test_rows_that_exceed_one_message_are_a_transport_error():
    rows = torch.empty(2**30 + 1, dtype=torch.uint8)
    with pytest.raises(TransportError, match="rows of request 1: 1073741825 bytes, at most 1073741824"):
        encode_request(HostRequest(1, (Segment("a", 2**30 + 1),), rows, 1.0), address=ADDRESS)


def test_rows_without_a_dimension_are_a_transport_error():
    with pytest.raises(TransportError, match="segments list 1 rows"):
        encode_request(HostRequest(1, (Segment("a", 1),), torch.tensor(1.0), 1.0), address=ADDRESS)
    with pytest.raises(TransportError, match="results list 1 good rows"):
        encode_reply(HostReply(1, (SegmentResult("a", 1),), torch.tensor(1.0)), address=ADDRESS)


def test_longest_errors_of_the_most_segments_fit_the_header():
    result = SegmentResult("\U0001f600" * MAX_REPLICA_ID_CHARACTERS, 2**32, "\U0001f600" * 5000, 1e300)
    frames = encode_reply(HostReply(2**64 - 1, (result,) * MAX_SEGMENTS, None), address=ADDRESS)
    results = decode_reply(views(frames)).reply.results
    assert len(results) == MAX_SEGMENTS
    assert results[0].error == "\U0001f600" * MAX_ERROR_CHARACTERS
