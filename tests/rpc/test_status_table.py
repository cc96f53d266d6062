"""A client raises what the router raised, and learns nothing that it should not."""

from __future__ import annotations

import grpc
import pytest

from moe_runtime import errors
from moe_runtime.errors import (
    ConfigError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    MoERuntimeError,
    OverloadedError,
    RequestTooLargeError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.rpc.border import Border
from moe_runtime.rpc.methods import ERROR_KEY, RETRY_AFTER_KEY
from moe_runtime.rpc.status import STATUS_CODES, error_of, metadata_of, status_of

CODES = grpc.StatusCode
OF_THE_START = {
    *("ConfigError", "PlugInError", "UnsupportedModelError", "WeightsError"),
    *("StartError", "PlacementError", "AlreadyRunningError"),
}
#: What routers get as the text of an outcome.
OF_HOSTS = {"InnerLayerError"}


@pytest.mark.parametrize("kind", STATUS_CODES)
def test_error_survives_the_way_to_the_client(kind: type[MoERuntimeError]) -> None:
    error = kind("layer vectors: expected 4, found 5")
    raised = error_of(*status_of(error), metadata_of(error))
    assert type(raised) is kind
    assert str(raised) == str(error)


def test_every_error_is_in_the_table_or_can_only_happen_at_the_start_or_in_a_host() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, MoERuntimeError) and value is not MoERuntimeError
    }
    assert {kind.__name__ for kind in STATUS_CODES} == tree - OF_THE_START - OF_HOSTS


def test_hint_when_to_retry_survives() -> None:
    error = OverloadedError("full", retry_after_ms=12.5)
    raised = error_of(*status_of(error), metadata_of(error))
    assert isinstance(raised, OverloadedError)
    assert raised.retry_after_ms == 12.5


@pytest.mark.parametrize("hint", ["soon", "nan", "-1", "inf", None])
def test_hint_that_is_no_time_is_none(hint: str | None) -> None:
    metadata = [(ERROR_KEY, "OverloadedError"), (RETRY_AFTER_KEY, hint)]
    raised = error_of(CODES.RESOURCE_EXHAUSTED, "full", metadata)
    assert isinstance(raised, OverloadedError)
    assert raised.retry_after_ms == 0.0


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (CODES.UNAVAILABLE, "connection refused", UnavailableError),
        (CODES.DEADLINE_EXCEEDED, "Deadline Exceeded", DeadlineExceededError),
        (CODES.CANCELLED, None, UnavailableError),
        (CODES.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", OverloadedError),
        (CODES.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (5 vs. 4)", RequestTooLargeError),
        (CODES.INVALID_ARGUMENT, "odd", InvalidRequestError),
        (CODES.NOT_FOUND, "no such layer", UnknownLayerError),
        (CODES.UNKNOWN, "Unexpected <class 'KeyError'>", InternalError),
        (CODES.DATA_LOSS, None, InternalError),
    ],
)
def test_status_of_grpc_itself_becomes_the_nearest_error(
    code: grpc.StatusCode, details: str | None, expected: type[MoERuntimeError]
) -> None:
    assert type(error_of(code, details, None)) is expected


def test_error_that_a_newer_router_knows_is_told_by_its_code() -> None:
    raised = error_of(CODES.INVALID_ARGUMENT, "odd", [(ERROR_KEY, "WrongPhaseOfTheMoonError")])
    assert type(raised) is InvalidRequestError


@pytest.mark.parametrize("exc", [KeyError("secret"), ConfigError("secret"), MoERuntimeError("secret")])
def test_unexpected_exception_becomes_an_internal_error_without_its_text(exc: Exception) -> None:
    error = Border().error(exc, method="Forward")
    assert type(error) is InternalError
    assert "secret" not in str(error)


def test_long_message_is_cut_to_what_trailing_metadata_can_carry() -> None:
    assert len(status_of(InvalidRequestError("x" * 10_000))[1]) == 1024
    assert status_of(InvalidRequestError("\N{SNOWMAN}" * 10_000))[1] == "\N{SNOWMAN}" * 341
