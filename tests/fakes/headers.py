"""A request and a reply of the data plane, and their frames with fields changed."""

from __future__ import annotations

import msgpack
import torch

from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.header import encode_reply, encode_request
from moe_runtime.transport.header_fields import Address, ReplyHeader, RequestHeader

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
