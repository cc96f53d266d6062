from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fakes.live_router import LiveRouter, StartRouter
from fakes.secured import ALICE, BOB, ENTRIES, ROWS, expect_good_request, tls_config, write_tokens
from fakes.service import FakeClock
from moe_runtime.config.runtime import LimitsConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.errors import (
    ConfigError,
    ExpertError,
    InternalError,
    InvalidRequestError,
    MoERuntimeError,
    OverloadedError,
    TransportError,
    UnknownLayerError,
)
from moe_runtime.rpc.border import Border, failure_kind
from moe_runtime.rpc.certificates import make_certificates
from moe_runtime.rpc.channels import ClientTLS
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.server import RpcServer
from moe_runtime.rpc.status import status_of
from moe_runtime.service.report import empty_report
from moe_runtime.service.requests import LayerRequest
from moe_runtime.wire.messages import Report

SECRET = "/home/me/secret.py"


class ChosenError(ExpertError):
    """A plug-in's own."""


def reported(*warnings: str) -> Report:
    return empty_report(LayerRequest("r", "vectors", torch.zeros(0, 3)), table_version=1, warnings=warnings)


class Overheard:
    """A service that notes whose requests it is given."""

    def __init__(self, service: Any) -> None:
        self._service = service
        self.clients: list[str] = []

    def submit(self, request: LayerRequest, on_done: Any) -> Any:
        self.clients.append(request.client)
        return self._service.submit(request, on_done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


def overheard(live: LiveRouter, security: SecurityConfig | None) -> tuple[Overheard, RpcServer]:
    service = Overheard(live.service)
    server: Any = RpcServer(service, address="127.0.0.1:0", limits=LimitsConfig(), info={}, security=security)  # type: ignore[arg-type]  # it stands for one
    return service, server


def test_request_carries_the_name_of_its_token(start_router: StartRouter, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens.yaml", ENTRIES)
    service, server = overheard(start_router(), SecurityConfig(tokens=str(tokens)))
    address = server.start()
    for token in (ALICE, BOB, ALICE):
        expect_good_request(address, token=token)
    server.stop(0.0)
    assert service.clients == ["alice", "bob", "alice"]


def test_request_carries_the_name_in_its_certificate(start_router: StartRouter, tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "certs", client_name="carol")
    service, server = overheard(start_router(), tls_config(files, mutual=True))
    expect_good_request(server.start(), tls=ClientTLS(ca=files.ca, cert=files.client, key=files.client_key))
    server.stop(0.0)
    assert service.clients == ["carol"]


def test_request_of_somebody_without_a_name_carries_the_address(start_router: StartRouter) -> None:
    service, server = overheard(start_router(), None)
    expect_good_request(server.start())
    server.stop(0.0)
    assert service.clients == ["127.0.0.1"]


@pytest.mark.parametrize(
    "error",
    [
        KeyError(SECRET),
        ConfigError(SECRET),
        MoERuntimeError(SECRET),
        InternalError(SECRET),
        TransportError(SECRET),
        ExpertError(SECRET),
        ChosenError(SECRET),
        ExpertError(f"layer l: expert conv-0: l/conv-0/0: raised KeyError: {SECRET}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_inside_is_told_by_a_reference_that_the_log_has(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        told = Border().error(error, method="Forward")
    assert SECRET not in str(told)
    assert "reference " in str(told)
    reference = str(told).partition("reference ")[2][:8]
    assert f"Forward failed, reference {reference}" in caplog.text
    assert SECRET in caplog.text


def test_error_of_an_expert_names_it_and_the_kind_of_failure() -> None:
    told = Border().error(ExpertError(f"layer l: expert conv-0: raised {SECRET}"), method="Forward")
    assert type(told) is ExpertError
    assert str(told).startswith("layer l: expert conv-0: it raised; reference ")


def test_error_about_the_request_reaches_its_client(caplog: pytest.LogCaptureFixture) -> None:
    for error in (InvalidRequestError("expected 4, found 5"), OverloadedError("full", retry_after_ms=3)):
        assert Border().error(error, method="Forward") is error
    assert caplog.text == ""


def test_text_of_an_error_is_one_line_of_bounded_length() -> None:
    _, details = status_of(UnknownLayerError("found 'a\nb\x1b[31m\0\u202e' " + "x" * 5000))
    assert details.startswith("found 'a\\nb\\x1b[31m\\x00\\u202e' ")
    assert len(details) == 1024


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("no replica is ready", "no replica is ready"),
        (f"l/e/0: raised ValueError: {SECRET}", "it raised"),
        (
            f"l/e/0: raised InnerLayerError: layer in: served none of 8 assignments: {SECRET}",
            "its inner layer served nothing",
        ),
        (f"l/e/0: raised InnerLayerError: layer in: UnavailableError: {SECRET}", "its inner layer gave no answer"),
        ("l/e/0: expected finite outputs, found NaN or infinity in 1 of 2 rows", "its output was not finite"),
        ("l/e/0: expected output of shape [2, 3], found [2, 4]", "its output was wrong"),
        ("its host sent no rows, expected 2", "its output was wrong"),
        ("its host answered for other rows than it was sent", "its output was wrong"),
        ("it waited at its host for longer than 2.0 s", "it did not answer in time"),
        ("no answer within its share of the layer's timeout_ms", "it did not answer in time"),
        ("its replicas do not answer", "it did not answer in time"),
        ("its queue is full", "its queue is full"),
        ("its process is frozen", "its host is gone"),
        ("its host is out", "its host is gone"),
        ("its host closed", "its host is gone"),
        (SECRET, "it failed"),
    ],
)
def test_failure_of_an_expert_is_told_by_its_kind(reason: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    assert failure_kind(reason) == kind
    report = Border().report(reported(f"expert conv-0: {reason}"))
    assert report.warnings == (f"expert conv-0: {kind}",)
    assert SECRET not in str(report)
    assert reason == kind or reason in caplog.text


@pytest.mark.parametrize("fate", ["", "; rerouted", "; served by another replica"])
def test_what_became_of_the_rows_is_told_too(fate: str) -> None:
    report = Border().report(reported(f"expert conv-0: its process ended{fate}"))
    assert report.warnings == (f"expert conv-0: its host is gone{fate}",)


def test_words_of_a_failure_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    border = Border(now=clock.now)
    report = reported("option task has no effect", "expert a: raised A", "expert a: raised B", "expert b: raised A")
    for _ in range(3):
        told = border.report(report).warnings
    assert told == ("option task has no effect", "expert a: it raised", "expert b: it raised")
    assert len(caplog.records) == 3
    clock.advance(61.0)
    border.report(report)
    assert len(caplog.records) == 6


def test_report_without_warnings_is_left_alone() -> None:
    report = reported()
    assert Border().report(report) is report


@pytest.mark.parametrize("layer", ["no\nsuch", "no such" * 1000, "\x1b[31m", "../../etc/passwd"])
def test_layer_that_is_none_is_refused_in_one_short_line(router: LiveRouter, layer: str) -> None:
    with MoEClient(router.address) as client, pytest.raises(InvalidRequestError) as caught:
        client.forward(ROWS, layer=layer, timeout_s=20)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    expect_good_request(router.address)


def test_reflection_is_off(router: LiveRouter) -> None:
    for version in ("v1", "v1alpha"):
        method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        with grpc.insecure_channel(router.address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(method)(iter([b""]), timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_description_and_status_hold_no_paths(router: LiveRouter) -> None:
    with MoEClient(router.address) as client:
        told = str(client.describe(timeout_s=20)) + str(client.status(timeout_s=20))
    assert not any(word in told for word in ("/tmp", "/home", "/root", ".py", "Traceback", str(Path.cwd())))
