"""Messages of the data plane: what is written is what is read."""

import msgpack
import msgspec
import pytest
import torch

from fakes.headers import ADDRESS, REPLY, REQUEST, REQUEST_FIELDS, reply_frames, request_frames, views
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
    MAX_SEGMENTS,
    Place,
)
from moe_runtime.transport.row_frames import MAX_FRAME_BYTES, MAX_INLINE_BYTES


def test_few_rows_are_part_of_the_header():
    (header,) = encode_request(REQUEST, address=ADDRESS)
    assert dict(zip(REQUEST_FIELDS, msgpack.unpackb(header), strict=True)) == {
        "version": 6,
        "kind": "request",
        "ticket": 5,
        "address": [2**64 - 1, 1],
        "segments": [["a/b/0", 2], ["a/c/0", 1]],
        "dtype": "float32",
        "shape": [3, 2],
        "rows": torch.arange(6.0).numpy().tobytes(),
        "timeout_s": 0.25,
        "request_ids": [],
        "is_suspect": False,
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
    with pytest.raises(TransportError, match="results list 1 rows"):
        encode_reply(HostReply(1, (SegmentResult("a", 1),), torch.tensor(1.0)), address=ADDRESS)


def test_longest_errors_of_the_most_segments_fit_the_header():
    result = SegmentResult("\U0001f600" * MAX_REPLICA_ID_CHARACTERS, 2**32, "\U0001f600" * 5000, 1e300)
    frames = encode_reply(HostReply(2**64 - 1, (result,) * MAX_SEGMENTS, None), address=ADDRESS)
    results = decode_reply(views(frames)).reply.results
    assert len(results) == MAX_SEGMENTS
    assert results[0].error == "\U0001f600" * MAX_ERROR_CHARACTERS


def test_request_tells_whose_rows_it_carries():
    request = msgspec.structs.replace(REQUEST, request_ids=("first", "second"))
    incoming = decode_request(views(encode_request(request, address=ADDRESS)))
    assert incoming.request.request_ids == ("first", "second")


def test_reply_with_failed_rows_holds_all_rows_of_their_segment():
    results = (SegmentResult("a/b/0", 2, "not finite", 1.5, (1,), True), SegmentResult("a/c/0", 1, "it raised", 0.0))
    reply = HostReply(5, results, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    incoming = decode_reply(views(encode_reply(reply, address=ADDRESS)))
    assert incoming.reply.results == results
    assert torch.equal(incoming.reply.rows, reply.rows)
