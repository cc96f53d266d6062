"""What is fuzzed: each target takes any bytes, and must end in an answer or in the errors of its border.

The modules under test are imported here, so that whoever wants them instrumented can do so around this import.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import torch
import zmq

from fakes.headers import reply_frames, request_frames
from fakes.live_router import WIDTH, LiveRouter
from fakes.malformed import GOOD, MALFORMED
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import ProtocolError, ProtocolVersionError, TransportError
from moe_runtime.rpc.methods import DESCRIBE, ERROR_KEY, FORWARD, FORWARD_STREAM, STATUS, path
from moe_runtime.rpc.status import STATUS_CODES
from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.header import decode_reply as decode_reply_frames
from moe_runtime.transport.header import decode_request as decode_request_frames
from moe_runtime.transport.ipc_folder import near_path
from moe_runtime.transport.near_channel import OFFER, ROUTE_BYTES
from moe_runtime.transport.zmq_host import ZmqHostTransport
from moe_runtime.transport.zmq_router import ZmqTransport
from moe_runtime.wire.codec import (
    decode_info,
    decode_info_request,
    decode_reply,
    decode_request,
    encode_info,
    encode_reply,
    encode_request,
)
from moe_runtime.wire.messages import ForwardReply, Report
from moe_runtime.wire.tensors import from_numpy, to_numpy

MAX_FRAMES = 4
_LENGTH = struct.Struct("<H")
_ANSWERABLE = {error.__name__ for error in STATUS_CODES}
_CHECK_EVERY = 64


class Target(Protocol):
    """Something that strangers can send bytes to."""

    def __call__(self, data: bytes) -> None:
        """Give it some bytes; raises for anything but an answer or the border's own errors."""
        ...


def to_frames(data: bytes) -> list[bytes]:
    """Bytes as frames: each but the last begins with its length in two bytes."""
    frames = []
    while len(data) > _LENGTH.size and len(frames) < MAX_FRAMES - 1:
        (length,) = _LENGTH.unpack_from(data)
        if length > len(data) - _LENGTH.size:
            break
        frames.append(data[_LENGTH.size : _LENGTH.size + length])
        data = data[_LENGTH.size + length :]
    return [*frames, data]


def from_frames(*frames: bytes) -> bytes:
    """The bytes that ``to_frames`` gives these frames for."""
    *first, last = frames
    return b"".join([*(_LENGTH.pack(len(frame)) + frame for frame in first), last])


def wire(data: bytes) -> None:
    """The decoders of the gRPC protocol; what they read they can write, and read again as the same."""
    which, body = data[:1], data[1:]
    try:
        match (which or b"\0")[0] % 4:
            case 0:
                request = decode_request(body)
                assert encode_request(decode_request(encode_request(request))) == encode_request(request)
                assert to_numpy(request.inputs).nbytes == len(request.inputs.data)
            case 1:
                reply = decode_reply(body)
                assert encode_reply(decode_reply(encode_reply(reply))) == encode_reply(reply)
            case 2:
                encode_info(decode_info(body))
            case _:
                decode_info_request(body)
    except (ProtocolError, ProtocolVersionError):
        return


def frames(data: bytes) -> None:
    """The decoders of the data plane; rows that they give have the bytes that their shape says."""
    which, rest = data[:1], data[1:]
    views = [memoryview(bytearray(frame)) for frame in to_frames(rest)]
    try:
        if (which or b"\0")[0] % 2:
            rows = decode_reply_frames(views).reply.rows
        else:
            rows = decode_request_frames(views).request.rows
    except TransportError:
        return
    if rows is not None:
        assert math.prod(rows.shape) * rows.itemsize == rows.nbytes
        rows.sum()


class GrpcMethods:
    """A router's methods, through a channel; in between, good requests are answered."""

    def __init__(self) -> None:
        self._router = LiveRouter(limits=LimitsConfig(), router=RouterConfig()).start()
        self._channel = grpc.insecure_channel(self._router.address)
        self._calls: list[Callable[[bytes], Any]] = [
            self._unary(FORWARD), self._stream, self._unary(DESCRIBE), self._unary(STATUS),
        ]  # fmt: skip
        self._num_calls = 0

    def __call__(self, data: bytes) -> None:
        which, body = data[:1], data[1:]
        try:
            self._calls[(which or b"\0")[0] % len(self._calls)](body)
        except grpc.RpcError as exc:
            self._check(exc)
        self._num_calls += 1
        if self._num_calls % _CHECK_EVERY == 0:
            decode_reply(self._calls[0](GOOD))

    def _unary(self, method: str) -> Callable[[bytes], Any]:
        call = self._channel.unary_unary(path(method))
        return lambda body: call(body, timeout=10)

    def _stream(self, body: bytes) -> None:
        pieces = to_frames(body)
        list(self._channel.stream_stream(path(FORWARD_STREAM))(iter(pieces), timeout=10))

    def _check(self, error: grpc.RpcError) -> None:
        name = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
        details = error.details() or ""
        if name not in _ANSWERABLE or name == "InternalError" or "Traceback" in details or "/moe_runtime/" in details:
            raise AssertionError(f"expected a typed error, found {name!r}: {error.code()} {details}")


class HostSockets:
    """An expert host's two sockets, and a stranger's frames; in between, a router's requests are answered."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp")
        self._host = ZmqHostTransport(node="here", ip=None, folder=Path(self._folder.name))
        self._router = ZmqTransport(node="here")
        endpoint = self._host.endpoint
        self._near_path = near_path(Path(endpoint.local.removeprefix("ipc://")))
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint.local)
        self._near: socket.socket | None = None
        self._num_calls = 0

    def __call__(self, data: bytes) -> None:
        which, rest = data[:1], data[1:]
        if (which or b"\0")[0] % 2:
            self._say_nearby(rest)
        else:
            # What does not fit its queue is dropped: the queue is bounded, and the host is given time below.
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(to_frames(rest), flags=zmq.DONTWAIT)
        self._answer()
        self._num_calls += 1
        if self._num_calls % _CHECK_EVERY == 0:
            self._exchange()

    def _say_nearby(self, data: bytes) -> None:
        try:
            if self._near is None:
                self._near = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._near.connect(str(self._near_path))
                self._near.setblocking(False)
                if data[:1] > b"\x40":
                    # Most often as a router begins, so that what follows is read as a message.
                    self._near.send(b"r" * ROUTE_BYTES)
            self._near.send(data)
        except OSError:
            # The host has shown it out; the next one comes anew.
            self._near.close()
            self._near = None

    def _answer(self, wait_s: float = 0.0) -> None:
        for delivery in self._host.receive(wait_s):
            segments = delivery.request.segments
            results = tuple(SegmentResult(each.replica_id, each.num_rows, "no rows today") for each in segments)
            self._host.reply(delivery, HostReply(delivery.request.ticket, results, None))

    def _exchange(self) -> None:
        request = HostRequest(self._num_calls, (Segment("layer/expert/0", 2),), torch.ones(2, 3), 5.0)
        self._router.send(self._host.endpoint, request)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            self._answer(0.001)
            if any(getattr(event, "ticket", None) == request.ticket for event in self._router.poll(0.001)):
                return
        raise AssertionError(f"request {request.ticket}: expected an answer after so much noise, found none")


def planted(data: bytes) -> None:
    """A decoder with a mistake that random bytes do not find: shows that the fuzzer would."""
    if data[:1] == b"m" and data[1:2] == b"o" and data[2:3] == b"e":
        raise ValueError("planted")


#: What makes a target, by name.
TARGETS: dict[str, Callable[[], Target]] = {
    "planted": lambda: planted,
    "wire": lambda: wire,
    "frames": lambda: frames,
    "grpc": GrpcMethods,
    "sockets": HostSockets,
}


def seeds(name: str) -> Iterator[bytes]:
    """Inputs to begin from: what is right, and what is known to be wrong, for each way into a target."""
    bodies = [body for body, _ in MALFORMED.values() if len(body) <= MAX_SEED_BYTES]
    if name == "planted":
        yield b"hello"
        return
    good = [GOOD, encode_info(), encode_info({"layers": {"a": [1, 2.5, None, "x"]}}), _reply()]
    packed = [bytes(request_frames()[0]), bytes(reply_frames()[0])]
    if name == "wire":
        yield from (bytes([which]) + body for which in range(4) for body in good)
        yield from (b"\0" + body for body in bodies)
    elif name == "grpc":
        yield from (bytes([which]) + body for which in (0, 2, 3) for body in good)
        yield from (b"\0" + body for body in bodies)
        yield b"\1" + from_frames(GOOD[:20], GOOD[20:40], GOOD[40:])
    else:
        for which in range(2):
            yield from (bytes([which]) + frame for frame in packed)
            yield from (bytes([which]) + from_frames(frame, bytes(24)) for frame in packed)
        yield bytes([1]) + OFFER.pack(1, 1 << 20)


MAX_SEED_BYTES = 4096


def _reply() -> bytes:
    report = Report("r-1", "vectors", 1, 2, 2, 2, 0, 0, 0, batch_tokens=(2,), warnings=("w",), **_routing(2))
    return encode_reply(ForwardReply(from_numpy(np.ones((2, WIDTH), np.float32)), report))


def _routing(num_assignments: int) -> dict[str, Any]:
    return {
        "token_ids": np.arange(num_assignments),
        "expert_ids": np.zeros(num_assignments, np.int64),
        "expert_weights": np.ones(num_assignments, np.float32),
        "outcomes": np.zeros(num_assignments, np.uint8),
    }
