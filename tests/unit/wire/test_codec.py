"""Requests, replies and descriptions survive the wire; anything malformed is refused with one typed error."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.malformed import GOOD, MALFORMED, fields, options, request_map
from moe_runtime.errors import InvalidRequestError, ProtocolError, ProtocolVersionError
from moe_runtime.wire.codec import (
    decode_info,
    decode_info_request,
    decode_reply,
    decode_request,
    encode_info,
    encode_reply,
    encode_request,
)
from moe_runtime.wire.messages import ForwardReply, ForwardRequest, Report, RequestOptions, Timings, WireTensor
from moe_runtime.wire.tensors import from_numpy, to_numpy

REPORT = Report(
    request_id="r-1",
    layer="vectors",
    table_version=3,
    num_tokens=2,
    num_assignments=4,
    num_served=2,
    num_dropped_capacity=1,
    num_dropped_failure=1,
    num_rerouted=1,
    num_hedged=0,
    num_retried=1,
    batch_tokens=(2, 7),
    timings=Timings(queue_ms=0.5, gate_ms=1.0, experts_ms=2.0, combine_ms=0.25, total_ms=4.0),
    warnings=("option task has no effect",),
    token_ids=np.array([0, 0, 1, 1]),
    expert_ids=np.array([1, 0, 1, 2]),
    expert_weights=np.array([0.75, 0, 0.5, 0], np.float32),
    outcomes=np.array([0, 1, 0, 2], np.uint8),
)
OUTPUTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def frozen(tensor: Any) -> Any:
    """The tensor with its bytes compared by value."""
    return dataclasses.replace(tensor, data=bytes(tensor.data)) if isinstance(tensor, WireTensor) else tensor


def reply_map(**report_changes: Any) -> dict[str, Any]:
    message = msgpack.unpackb(encode_reply(ForwardReply(from_numpy(OUTPUTS), REPORT)))
    message["report"].update(report_changes)
    return message


def test_request_with_everything_survives() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    request = ForwardRequest(
        request_id="r-1",
        layer="vectors",
        inputs=from_numpy(rows),
        options=RequestOptions(
            gate_input=from_numpy(rows * 2),
            token_ids=from_numpy(np.array([5, 6])),
            task="translate",
            k=from_numpy(np.array([1, 2])),
            seed=2**63 - 1,
            mask=from_numpy(np.array([True, False])),
            isolated=True,
        ),
        return_routing=True,
    )
    decoded = decode_request(encode_request(request))
    assert (decoded.request_id, decoded.layer, decoded.return_routing) == ("r-1", "vectors", True)
    assert frozen(decoded.inputs) == frozen(request.inputs)
    for field in dataclasses.fields(RequestOptions):
        expected = frozen(getattr(request.options, field.name))
        assert frozen(getattr(decoded.options, field.name)) == expected, field.name


def test_request_with_nothing_optional_sends_nothing_optional() -> None:
    request = ForwardRequest("r-1", "vectors", from_numpy(np.ones((2, 4), np.float32)))
    body = encode_request(request)
    assert body == GOOD
    assert decode_request(body).options == RequestOptions()


def test_one_k_for_all_rows_is_a_plain_number() -> None:
    assert decode_request(options(k=1)).options.k == 1


def test_converting_the_arrays_of_options_leaves_the_rest_as_it_is() -> None:
    options_in = RequestOptions(k=2, mask=np.array([True]), task="t", seed=1)
    assert options_in.map_arrays(len) == RequestOptions(k=2, mask=1, task="t", seed=1)
    assert RequestOptions(k=np.array([1, 2])).map_arrays(len).k == 2


def test_nil_is_the_same_as_absent() -> None:
    assert decode_request(fields(options=None, return_routing=None)).options == RequestOptions()


def test_request_arrives_in_a_bytearray_as_well() -> None:
    assert decode_request(bytearray(GOOD)).layer == "vectors"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused(name: str) -> None:
    body, error = MALFORMED[name]
    with pytest.raises(error) as caught:
        decode_request(body)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["a megabyte of nested array headers", "a megabyte of empty arrays", "a megabyte of empty maps"]
)
def test_refusing_many_containers_takes_little_memory(name: str) -> None:
    body = MALFORMED[name][0]
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode_request(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_reply_of_an_older_minor_version_lacks_the_counts_that_came_later() -> None:
    message = reply_map()
    del message["report"]["num_retried"]
    report = decode_reply(msgpack.packb({**message, "protocol": [1, 0]})).report
    assert (report.num_rerouted, report.num_retried) == (1, 0)


SHARED = {
    "num_shared_served": 3,
    "num_shared_dropped": 1,
    "shared_weights": np.array([[1.0, 0.5], [0.0, 0.25]], np.float32),
}


def test_what_is_reported_of_shared_experts_survives_and_is_left_out_where_there_are_none() -> None:
    body = encode_reply(ForwardReply(from_numpy(OUTPUTS), dataclasses.replace(REPORT, **SHARED)))
    report = decode_reply(body).report
    assert (report.num_shared_served, report.num_shared_dropped) == (3, 1)
    assert report.shared_weights is not None
    np.testing.assert_array_equal(report.shared_weights, SHARED["shared_weights"])
    assert not SHARED.keys() & reply_map()["report"].keys()
    bare = decode_reply(msgpack.packb(reply_map())).report
    assert (bare.num_shared_served, bare.num_shared_dropped, bare.shared_weights) == (0, 0, None)


@pytest.mark.parametrize(
    "weights", [np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float64), np.zeros(2, np.float32)]
)
def test_weights_of_shared_experts_of_another_kind_are_refused(weights: np.ndarray[Any, Any]) -> None:
    body = encode_reply(ForwardReply(from_numpy(OUTPUTS), dataclasses.replace(REPORT, shared_weights=weights)))
    with pytest.raises(ProtocolError, match=r"report\.shared_weights: expected float32 of shape \(2, num_shared\)"):
        decode_reply(body)


def test_newer_minor_version_may_bring_unknown_keys_anywhere() -> None:
    message = request_map(protocol=[1, 7], surprise=[1], options={"seed": 4, "surprise": "x"})
    message["inputs"]["surprise"] = 0
    assert decode_request(msgpack.packb(message)).options.seed == 4


def test_value_that_msgpack_cannot_carry_is_named_before_anything_is_sent() -> None:
    inputs = from_numpy(np.ones((1, 4), np.float32))
    request = ForwardRequest("r-1", "vectors", inputs, RequestOptions(seed=2**70))
    with pytest.raises(InvalidRequestError, match="msgpack can carry"):
        encode_request(request)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_one_typed_error(body: bytes) -> None:
    with contextlib.suppress(ProtocolError, ProtocolVersionError):
        decode_request(body)


@given(st.data())
def test_any_mutation_of_a_good_request_is_a_request_or_one_typed_error(data: st.DataObject) -> None:
    body = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(body) - 1))
        body[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError, ProtocolVersionError):
        request = decode_request(bytes(body))
        assert to_numpy(request.inputs).nbytes >= len(request.inputs.data)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["protocol", "request_id", "layer", "inputs", "options", "return_routing"]), plain_values)
def test_any_value_in_any_field_is_a_request_or_one_typed_error(field: str, value: Any) -> None:
    with contextlib.suppress(ProtocolError, ProtocolVersionError):
        decode_request(fields(**{field: value}))


@given(st.sampled_from(["dtype", "shape", "data"]), plain_values)
def test_any_value_in_a_tensor_is_a_request_or_one_typed_error(field: str, value: Any) -> None:
    message = request_map()
    message["inputs"][field] = value
    with contextlib.suppress(ProtocolError):
        decode_request(msgpack.packb(message))


def test_reply_survives_with_its_routing() -> None:
    reply = decode_reply(encode_reply(ForwardReply(from_numpy(OUTPUTS), REPORT)))
    np.testing.assert_array_equal(to_numpy(reply.outputs), OUTPUTS)
    for field in dataclasses.fields(Report):
        expected, found = getattr(REPORT, field.name), getattr(reply.report, field.name)
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        else:
            assert found == expected, field.name


def test_reply_without_routing_has_none() -> None:
    plain = dataclasses.replace(REPORT, token_ids=None, expert_ids=None, expert_weights=None, outcomes=None)
    report = decode_reply(encode_reply(ForwardReply(from_numpy(OUTPUTS), plain))).report
    assert report == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_served": 3}, "sum to the 4 assignments, found 5"),
        ({"num_served": True}, "report.num_served: expected an integer"),
        ({"table_version": -1}, "report.table_version"),
        ({"timings": {"queue_ms": float("nan")}}, "report.timings.queue_ms: expected a finite number"),
        ({"timings": {"queue_ms": -1.0}}, "found -1.0"),
        ({"timings": {}}, "report.timings.queue_ms: expected this field"),
        ({"timings": 3}, "report.timings: expected a map, found 3"),
        ({"batch_tokens": [1, True]}, "report.batch_tokens: expected a list of int"),
        ({"batch_tokens": "12"}, "report.batch_tokens: expected a list"),
        ({"warnings": [1]}, "report.warnings: expected a list of str"),
        ({"expert_ids": {"dtype": "int64", "shape": [1], "data": b"\0" * 8}}, r"found int64 of shape \(1,\)"),
        ({"outcomes": {"dtype": "int8", "shape": [4], "data": b"\0" * 4}}, "expected uint8"),
        ({"surprise": 1}, "report: expected no further fields, found 'surprise'"),
    ],
)
def test_malformed_report_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_reply(msgpack.packb(reply_map(**changes)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_one_typed_error(body: bytes) -> None:
    for decode in (decode_reply, decode_info, decode_info_request):
        with contextlib.suppress(ProtocolError, ProtocolVersionError):
            decode(body)


def test_description_survives() -> None:
    info = {"layers": {"vectors": {"experts": [{"name": "a", "load": 0.5}]}}, "table_version": 2}
    assert decode_info(encode_info(info)) == info


def test_question_for_a_description_holds_nothing_but_the_version() -> None:
    decode_info_request(encode_info())
    with pytest.raises(ProtocolError, match="info"):
        decode_info_request(encode_info({"a": 1}))
