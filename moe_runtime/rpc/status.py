"""One table between the errors of the package and gRPC statuses, so that a client raises what the router raised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from moe_runtime.errors import (
    DeadlineExceededError,
    DTypeError,
    ExpertError,
    InternalError,
    InvalidRequestError,
    MoERuntimeError,
    NonFiniteError,
    OverloadedError,
    PermissionDeniedError,
    PoisonedRequestError,
    ProtocolError,
    ProtocolVersionError,
    RequestCancelledError,
    RequestTooLargeError,
    ShapeError,
    StreamRequiredError,
    TransportError,
    UnauthenticatedError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.rpc.methods import ERROR_KEY, RETRY_AFTER_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Every error that a router answers with; any other is answered as an ``InternalError``.
STATUS_CODES: dict[type[MoERuntimeError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownLayerError: grpc.StatusCode.NOT_FOUND,
    ShapeError: grpc.StatusCode.INVALID_ARGUMENT,
    DTypeError: grpc.StatusCode.INVALID_ARGUMENT,
    NonFiniteError: grpc.StatusCode.INVALID_ARGUMENT,
    RequestTooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    StreamRequiredError: grpc.StatusCode.FAILED_PRECONDITION,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    ProtocolVersionError: grpc.StatusCode.FAILED_PRECONDITION,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    ExpertError: grpc.StatusCode.INTERNAL,
    PoisonedRequestError: grpc.StatusCode.ABORTED,
    TransportError: grpc.StatusCode.INTERNAL,
    InternalError: grpc.StatusCode.INTERNAL,
}
_BY_NAME = {error.__name__: error for error in STATUS_CODES}

#: What a client makes of a status that carries no error name it knows: gRPC's own, or a newer router's.
_BY_CODE: dict[grpc.StatusCode, type[MoERuntimeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: UnknownLayerError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    # A caller that cancels never reads the status; without a name it is a server that stops.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolVersionError,
}
_GRPC_OVERSIZE = "larger than max"  # of gRPC's own message, which shares its code with a full queue
_MAX_DETAILS_BYTES = 1024  # gRPC bounds the trailing metadata, where each byte may take three


def status_of(error: MoERuntimeError) -> tuple[grpc.StatusCode, str]:
    """The code and the words with which a router answers a call that raised this error."""
    code = STATUS_CODES.get(type(error), grpc.StatusCode.INTERNAL)
    return code, printable(str(error)).encode()[:_MAX_DETAILS_BYTES].decode(errors="ignore")


def printable(text: str) -> str:
    """A text in one line: what would change how a log or a terminal shows it is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def metadata_of(error: MoERuntimeError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that lets a client raise the same error."""
    name = (ERROR_KEY, type(error).__name__)
    if isinstance(error, OverloadedError):
        return (name, (RETRY_AFTER_KEY, f"{error.retry_after_ms:.3f}"))
    return (name,)


def error_of(code: grpc.StatusCode, details: str | None, metadata: Iterable[tuple[str, Any]] | None) -> MoERuntimeError:
    """The error that a router answered with, or what its gRPC status amounts to.

    Args:
        code: The call's status code.
        details: The status's words.
        metadata: The call's trailing metadata.
    """
    entries = dict(metadata or ())
    message = details or f"the call ended with status {code.name} and no explanation"
    kind = _BY_NAME.get(str(entries.get(ERROR_KEY))) or _BY_CODE.get(code, InternalError)
    if kind is not OverloadedError:
        return kind(message)
    if ERROR_KEY not in entries and _GRPC_OVERSIZE in message:
        return RequestTooLargeError(message)
    return OverloadedError(message, retry_after_ms=_milliseconds(entries.get(RETRY_AFTER_KEY)))


def is_lost(error: MoERuntimeError, metadata: Iterable[tuple[str, Any]] | None) -> bool:
    """Whether a call ended without a word of the router's: it could not be reached, or the connection broke."""
    return isinstance(error, UnavailableError) and ERROR_KEY not in dict(metadata or ())


def _milliseconds(text: object) -> float:
    try:
        value = float(str(text))
    except ValueError:
        return 0.0
    return value if 0 <= value < float("inf") else 0.0
