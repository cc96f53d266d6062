"""Each class of malformed input gets its typed error through a real channel, and harms nobody else."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.live_router import WIDTH, LiveRouter, StartRouter
from fakes.malformed import GOOD, MALFORMED, fields, inputs, options, tensor_map
from moe_runtime.config.runtime import LimitsConfig
from moe_runtime.errors import (
    DTypeError,
    InvalidRequestError,
    MoERuntimeError,
    NonFiniteError,
    ProtocolError,
    ProtocolVersionError,
    RequestTooLargeError,
    ShapeError,
    UnknownLayerError,
)
from moe_runtime.rpc.methods import ERROR_KEY, FORWARD, FORWARD_STREAM, UNARY_BYTES, path, slices
from moe_runtime.rpc.status import STATUS_CODES, error_of
from moe_runtime.wire.codec import decode_reply, encode_info
from moe_runtime.wire.tensors import to_numpy

ONES = np.ones((2, WIDTH), np.float32)


@pytest.fixture(scope="module")
def channel(router: LiveRouter) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(router.address, options=unlimited) as channel:
        yield channel


def send(channel: grpc.Channel, body: bytes) -> bytes:
    return channel.unary_unary(path(FORWARD))(body, timeout=20)


def send_stream(channel: grpc.Channel, pieces: list[bytes]) -> bytes:
    return b"".join(channel.stream_stream(path(FORWARD_STREAM))(iter(pieces), timeout=20))


def assert_refused(error: type[MoERuntimeError], call: Any, *args: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    assert dict(caught.value.trailing_metadata()).get(ERROR_KEY) == error.__name__
    assert caught.value.code() == STATUS_CODES[error]
    assert "Traceback" not in caught.value.details()
    return caught.value


def assert_good_request_succeeds(channel: grpc.Channel) -> None:
    reply = decode_reply(send(channel, GOOD))
    np.testing.assert_allclose(to_numpy(reply.outputs), ONES, rtol=1e-6)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_body_gets_its_error_and_the_next_request_its_answer(name: str, channel: grpc.Channel) -> None:
    body, error = MALFORMED[name]
    assert_refused(error, send, channel, body)
    assert_good_request_succeeds(channel)


REFUSED_BY_THE_LAYER = {
    "an unknown layer": (fields(layer="nowhere"), UnknownLayerError),
    "an unknown layer in four-byte characters": (fields(layer="\N{SNAKE}" * 256), UnknownLayerError),
    "a wrong item shape": (inputs(shape=[WIDTH, 2]), ShapeError),
    "rows without a row dimension": (inputs(shape=[2 * WIDTH]), ShapeError),
    "a scalar": (fields(inputs=tensor_map(np.float32(1).reshape(()))), ShapeError),
    "another float type": (fields(inputs=tensor_map(np.ones((2, WIDTH)))), DTypeError),
    "integers": (fields(inputs=tensor_map(np.ones((2, WIDTH), np.int32))), DTypeError),
    "one dtype labelled as another of its size": (inputs(dtype="int32"), DTypeError),
    "a mask of the wrong length": (options(mask=tensor_map(np.ones(3, bool))), ShapeError),
    "a mask of integers": (options(mask=tensor_map(np.ones(2, np.int8))), DTypeError),
    "a k of 0 for a row": (options(k=tensor_map(np.array([0, 1]))), InvalidRequestError),
    "a k above the layer's": (options(k=3), InvalidRequestError),
    "a wrong gate input": (options(gate_input=tensor_map(np.ones((2, 3), np.float32))), ShapeError),
}


@pytest.mark.parametrize("name", REFUSED_BY_THE_LAYER)
def test_request_that_does_not_fit_the_layer_gets_its_error(name: str, channel: grpc.Channel) -> None:
    body, error = REFUSED_BY_THE_LAYER[name]
    assert_refused(error, send, channel, body)
    assert_good_request_succeeds(channel)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("layer", "dtype"), [("vectors", "float32"), ("doubles", "float64"), ("brain", None)])
def test_non_finite_input_is_refused_in_every_float_type(
    value: float, layer: str, dtype: str | None, channel: grpc.Channel
) -> None:
    tensor = tensor_map(np.full((1, WIDTH), value, dtype or np.float32))
    if dtype is None:  # bfloat16 is the upper half of float32
        halves = np.frombuffer(tensor["data"], np.uint16)[1::2]
        tensor |= {"dtype": "bfloat16", "data": halves.tobytes()}
    assert_refused(NonFiniteError, send, channel, fields(layer=layer, inputs=tensor))
    assert_good_request_succeeds(channel)


def test_layer_may_allow_non_finite_input(channel: grpc.Channel) -> None:
    rows = np.array([[1, np.inf, 2, 3]], np.float32)
    reply = decode_reply(send(channel, fields(layer="raw", inputs=tensor_map(rows))))
    assert reply.report.num_tokens == 1


def test_empty_batch_gets_an_empty_answer(channel: grpc.Channel) -> None:
    reply = decode_reply(send(channel, fields(inputs=tensor_map(np.empty((0, WIDTH), np.float32)))))
    assert reply.outputs.shape == (0, WIDTH)


def test_message_above_the_unary_limit_is_too_large(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send(channel, bytes(UNARY_BYTES + 1))
    error = error_of(caught.value.code(), caught.value.details(), caught.value.trailing_metadata())
    assert type(error) is RequestTooLargeError
    assert_good_request_succeeds(channel)


def test_gzip_bomb_is_too_large(channel: grpc.Channel) -> None:
    call = channel.unary_unary(path(FORWARD))
    with pytest.raises(grpc.RpcError) as caught:
        call(bytes(64 << 20), timeout=20, compression=grpc.Compression.Gzip)
    error = error_of(caught.value.code(), caught.value.details(), caught.value.trailing_metadata())
    assert type(error) is RequestTooLargeError
    assert_good_request_succeeds(channel)


def test_request_of_too_many_tokens_is_too_large(channel: grpc.Channel) -> None:
    rows = np.ones((65537, WIDTH), np.float32)
    assert_refused(RequestTooLargeError, send, channel, fields(inputs=tensor_map(rows)))
    assert_good_request_succeeds(channel)


def test_body_above_the_router_limit_is_too_large(start_router: StartRouter) -> None:
    live = start_router(limits=LimitsConfig(max_request_bytes=1000))
    with grpc.insecure_channel(live.address) as channel:
        assert_refused(RequestTooLargeError, send, channel, bytes(1001))
        assert_refused(RequestTooLargeError, send_stream, channel, [bytes(600), bytes(600)])
        assert_good_request_succeeds(channel)


def test_stream_in_small_slices_is_one_request(channel: grpc.Channel) -> None:
    reply = decode_reply(send_stream(channel, [GOOD[i : i + 7] for i in range(0, len(GOOD), 7)]))
    np.testing.assert_allclose(to_numpy(reply.outputs), ONES, rtol=1e-6)


def test_stream_that_ends_early_is_refused(channel: grpc.Channel) -> None:
    assert_refused(ProtocolError, send_stream, channel, [GOOD[:20], GOOD[20:40]])
    assert_refused(ProtocolError, send_stream, channel, [])
    assert_good_request_succeeds(channel)


def test_empty_slice_is_refused(channel: grpc.Channel) -> None:
    assert_refused(ProtocolError, send_stream, channel, [GOOD[:20], b"", GOOD[20:]])
    assert_good_request_succeeds(channel)


def test_request_in_a_stream_is_checked_like_any_other(channel: grpc.Channel) -> None:
    assert_refused(UnknownLayerError, send_stream, channel, list(slices(fields(layer="nowhere"))))
    assert_good_request_succeeds(channel)


def test_stream_that_stays_half_open_ends_at_its_deadline(router: LiveRouter, channel: grpc.Channel) -> None:
    def pieces(sent: Any) -> Iterator[bytes]:
        yield GOOD[:20]
        sent.wait(20)

    over = threading.Event()
    call = channel.stream_stream(path(FORWARD_STREAM))(pieces(over), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    over.set()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert_good_request_succeeds(channel)


@pytest.mark.parametrize("method", ["Describe", "Status"])
def test_malformed_question_is_refused(method: str, channel: grpc.Channel) -> None:
    call = channel.unary_unary(path(method))
    assert_refused(ProtocolError, call, b"")
    assert_refused(ProtocolError, call, encode_info({"a": 1}))
    assert_refused(ProtocolVersionError, call, msgpack.packb({"protocol": [2, 0]}))


def test_unknown_method_is_another_version_to_a_client(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path("Train"))(GOOD, timeout=20)
    error = error_of(caught.value.code(), caught.value.details(), caught.value.trailing_metadata())
    assert type(error) is ProtocolVersionError
    assert_good_request_succeeds(channel)


def test_large_metadata_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path(FORWARD))(GOOD, timeout=20, metadata=[("x-large", "x" * 100_000)])
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_good_request_succeeds(channel)


def test_http_1_is_turned_away(router: LiveRouter, channel: grpc.Channel) -> None:
    host, port = router.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: router\r\n\r\n")
        while connection.recv(4096):
            pass
    assert_good_request_succeeds(channel)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300))
def test_any_bytes_get_a_typed_error_through_the_channel(body: bytes, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send(channel, body)
    assert dict(caught.value.trailing_metadata())[ERROR_KEY] in ("ProtocolError", "ProtocolVersionError")


def test_memory_stays_flat_under_garbage(channel: grpc.Channel) -> None:
    worst = [MALFORMED[name][0] for name in ("a megabyte of nested array headers", "large random bytes")]

    def flood() -> int:
        for _ in range(20):
            for body in worst:
                assert_refused(ProtocolError, send, channel, body)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = flood()
    assert flood() - before < 64 << 10  # KiB
    assert_good_request_succeeds(channel)
