"""Requests and replies to bytes and back; ``docs/protocol.md`` describes the same for other languages."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Any

from moe_runtime.errors import InvalidRequestError, ProtocolError, ProtocolVersionError
from moe_runtime.wire.fields import MAX_INT, MAX_NAME_CHARS, MAX_REQUEST_ID_CHARS, Fields
from moe_runtime.wire.framing import (
    INFO_LIMITS,
    REPLY_LIMITS,
    REQUEST_LIMITS,
    FrameLimits,
    pack,
    unpack,
)
from moe_runtime.wire.messages import ForwardReply, ForwardRequest, RequestOptions, WireTensor
from moe_runtime.wire.report_codec import report_from_fields, report_to_map, tensor_to_map

#: Version of the protocol that this side speaks: major, minor.
PROTOCOL_MAJOR, PROTOCOL_MINOR = 1, 2


def encode_request(request: ForwardRequest) -> bytes:
    """The request's bytes; options that are None or False are left out.

    Raises:
        InvalidRequestError: If a value cannot be carried.
    """
    message: dict[str, Any] = {
        "request_id": request.request_id,
        "layer": request.layer,
        "inputs": tensor_to_map(request.inputs),
    }
    options = _options_to_map(request.options)
    if options:
        message["options"] = options
    if request.return_routing:
        message["return_routing"] = True
    try:
        return _encode(message)
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidRequestError(f"expected values that msgpack can carry: {exc}") from exc


def decode_request(body: bytes | bytearray) -> ForwardRequest:
    """The request that the bytes hold.

    Raises:
        ProtocolError: If they hold no well-formed request.
        ProtocolVersionError: If they are of another major version.
    """
    message = _decode(body, limits=REQUEST_LIMITS)
    request = ForwardRequest(
        request_id=message.text("request_id", high=MAX_REQUEST_ID_CHARS),
        layer=message.text("layer", high=MAX_NAME_CHARS),
        inputs=message.tensor("inputs"),
        options=_options_from_fields(message.fields("options")),
        return_routing=message.flag("return_routing"),
    )
    message.finish()
    return request


def encode_reply(reply: ForwardReply) -> bytes:
    """The reply's bytes."""
    return _encode({"outputs": tensor_to_map(reply.outputs), "report": report_to_map(reply.report)})


def decode_reply(body: bytes) -> ForwardReply:
    """The reply that the bytes hold.

    Raises:
        ProtocolError: If they hold no well-formed reply.
        ProtocolVersionError: If they are of another major version.
    """
    message = _decode(body, limits=REPLY_LIMITS)
    reply = ForwardReply(outputs=message.tensor("outputs"), report=report_from_fields(message.fields("report")))
    message.finish()
    return reply


def encode_info(info: dict[str, Any] | None = None) -> bytes:
    """The bytes of a question for a description or the status, or, with ``info``, of its answer."""
    return _encode({} if info is None else {"info": info})


def decode_info_request(body: bytes) -> None:
    """Check that the bytes hold a question for a description or the status.

    Raises:
        ProtocolError: If they do not.
        ProtocolVersionError: If they are of another major version.
    """
    _decode(body, limits=REQUEST_LIMITS).finish()


def decode_info(body: bytes) -> dict[str, Any]:
    """The description or status that the bytes hold.

    Raises:
        ProtocolError: If they hold none.
        ProtocolVersionError: If they are of another major version.
    """
    message = _decode(body, limits=INFO_LIMITS)
    info = message.map("info")
    message.finish()
    return info


def _encode(message: dict[str, Any]) -> bytes:
    return pack({"protocol": [PROTOCOL_MAJOR, PROTOCOL_MINOR], **message})


def _decode(body: bytes | bytearray, *, limits: FrameLimits) -> Fields:
    """The message's fields but for its version, which comes first: another major may mean anything by the rest."""
    message = unpack(body, limits=limits)
    version = message.pop("protocol", None)
    if not isinstance(version, list) or len(version) != 2 or any(type(part) is not int for part in version):
        raise ProtocolError("protocol: expected [major, minor], two integers, found something else or nothing")
    major, minor = version
    if major != PROTOCOL_MAJOR:
        raise ProtocolVersionError(
            f"expected version {PROTOCOL_MAJOR}.x of the protocol, found {major}.{minor}: use a release of"
            " moe-runtime of the same protocol on both sides"
        )
    if not 0 <= minor <= MAX_INT:
        raise ProtocolError(f"protocol: expected a minor version of at least 0, found {minor}")
    return Fields(message, lenient=minor > PROTOCOL_MINOR)


def _options_to_map(options: RequestOptions[WireTensor]) -> dict[str, Any]:
    values = ((f.name, getattr(options, f.name)) for f in dataclass_fields(RequestOptions))
    return {
        name: tensor_to_map(value) if isinstance(value, WireTensor) else value
        for name, value in values
        if value is not None and value is not False
    }


def _options_from_fields(options: Fields) -> RequestOptions[WireTensor]:
    read = RequestOptions(
        gate_input=options.optional_tensor("gate_input"),
        token_ids=options.optional_tensor("token_ids"),
        task=options.text("task", high=MAX_NAME_CHARS) if options.has("task") else None,
        k=_int_or_tensor(options, "k", low=1) if options.has("k") else None,
        seed=options.integer("seed") if options.has("seed") else None,
        mask=options.optional_tensor("mask"),
        isolated=options.flag("isolated"),
    )
    options.finish()
    return read


def _int_or_tensor(options: Fields, name: str, *, low: int) -> int | WireTensor:
    return options.tensor(name) if options.is_map(name) else options.integer(name, low=low)
