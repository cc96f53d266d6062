from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from fakes.live_router import LiveRouter, StartRouter
from fakes.secured import ALICE, ROWS, exchange_raw, expect_good_request, raw_call, tls_config, write_tokens
from fakes.service import FakeClock
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.config.security import SecurityConfig, TLSConfig
from moe_runtime.errors import (
    ConfigError,
    InvalidRequestError,
    MoERuntimeError,
    ProtocolVersionError,
    UnauthenticatedError,
    UnavailableError,
)
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.certificates import CertificateFiles, make_certificates
from moe_runtime.rpc.channels import ClientTLS
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.methods import FORWARD, path
from moe_runtime.rpc.retries import RetryPolicy
from moe_runtime.rpc.server_tls import _read

ONCE = RetryPolicy(max_attempts=1)
HTTP_1 = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return make_certificates(tmp_path_factory.mktemp("ours") / "certs")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    """Certificates of another CA."""
    return make_certificates(tmp_path_factory.mktemp("theirs") / "certs")


@pytest.fixture(scope="module")
def encrypted(ours: CertificateFiles) -> Iterator[LiveRouter]:
    live = LiveRouter(limits=LimitsConfig(), router=RouterConfig(), security=tls_config(ours)).start()
    yield live
    live.stop()


@pytest.fixture(scope="module")
def mutual(ours: CertificateFiles) -> Iterator[LiveRouter]:
    live = LiveRouter(limits=LimitsConfig(), router=RouterConfig(), security=tls_config(ours, mutual=True)).start()
    yield live
    live.stop()


def client_tls(files: CertificateFiles) -> ClientTLS:
    return ClientTLS(ca=files.ca, cert=files.client, key=files.client_key)


def expect_unavailable(address: str, tls: ClientTLS | None) -> str:
    with MoEClient(address, tls=tls, retry_policy=ONCE) as client, pytest.raises(UnavailableError) as caught:
        client.forward(ROWS, layer="vectors", timeout_s=20)
    return str(caught.value)


def test_calls_by_tls_are_answered(encrypted: LiveRouter, ours: CertificateFiles) -> None:
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


async def test_asyncio_client_speaks_tls_too(mutual: LiveRouter, ours: CertificateFiles) -> None:
    async with AsyncMoEClient(mutual.address, tls=client_tls(ours)) as client:
        answer = await client.forward(ROWS, layer="vectors", timeout_s=20)
    np.testing.assert_allclose(answer.outputs, ROWS, rtol=1e-6)


def test_plain_text_to_a_tls_port_is_refused(encrypted: LiveRouter, ours: CertificateFiles) -> None:
    expect_unavailable(encrypted.address, None)
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


def test_tls_to_a_plain_port_is_refused(router: LiveRouter, ours: CertificateFiles) -> None:
    expect_unavailable(router.address, ClientTLS(ca=ours.ca))
    expect_good_request(router.address)


def test_client_refuses_a_router_of_another_ca(
    encrypted: LiveRouter, ours: CertificateFiles, theirs: CertificateFiles
) -> None:
    expect_unavailable(encrypted.address, ClientTLS(ca=theirs.ca))
    expect_unavailable(encrypted.address, ClientTLS())
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


def test_client_refuses_a_certificate_for_another_name(encrypted: LiveRouter, ours: CertificateFiles) -> None:
    expect_unavailable(encrypted.address, ClientTLS(ca=ours.ca, server_name="elsewhere.example"))
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca, server_name="localhost"))


def test_client_s_own_certificate_does_not_pass_for_a_router_s(
    start_router: StartRouter, ours: CertificateFiles
) -> None:
    security = SecurityConfig(tls=TLSConfig(cert=str(ours.client), key=str(ours.client_key)))
    impostor = start_router(security=security)
    expect_unavailable(impostor.address, ClientTLS(ca=ours.ca, server_name="localhost"))


def test_router_refuses_clients_without_a_certificate_of_its_ca(
    mutual: LiveRouter, ours: CertificateFiles, theirs: CertificateFiles
) -> None:
    expect_unavailable(mutual.address, ClientTLS(ca=ours.ca))
    expect_unavailable(mutual.address, ClientTLS(ca=ours.ca, cert=theirs.client, key=theirs.client_key))
    expect_unavailable(mutual.address, None)
    expect_good_request(mutual.address, tls=client_tls(ours))


def test_expired_certificate_of_a_client_is_refused(mutual: LiveRouter, ours: CertificateFiles, tmp_path: Path) -> None:
    old = make_certificates(tmp_path / "old", days=0)
    expect_unavailable(mutual.address, ClientTLS(ca=ours.ca, cert=old.client, key=old.client_key))
    expect_good_request(mutual.address, tls=client_tls(ours))


@pytest.mark.parametrize(
    "sent",
    [HTTP_1, b"\x16\x03\x01\x00\x05hello", b"\0" * 4096, b"", raw_call(path(FORWARD), {})],
    ids=["http-1", "broken-hello", "zeros", "nothing", "http-2-in-plain-text"],
)
def test_what_is_no_tls_gets_no_answer(encrypted: LiveRouter, ours: CertificateFiles, sent: bytes) -> None:
    assert b"grpc-status" not in exchange_raw(encrypted.address, sent)
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


def test_http_1_to_a_plain_port_gets_no_answer_of_a_router(router: LiveRouter) -> None:
    assert b"200" not in exchange_raw(router.address, HTTP_1)
    expect_good_request(router.address)


def test_connection_on_which_nothing_is_said_does_not_hold_up_others(
    encrypted: LiveRouter, ours: CertificateFiles
) -> None:
    host, _, port = encrypted.address.rpartition(":")
    with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as second:
        second.sendall(b"\x16\x03")
        expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


def test_unknown_method_by_tls_is_unimplemented(encrypted: LiveRouter, ours: CertificateFiles) -> None:
    credentials = grpc.ssl_channel_credentials(ours.ca.read_bytes())
    with grpc.secure_channel(encrypted.address, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/moe_runtime.v1.Router/Nonsense")(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    expect_good_request(encrypted.address, tls=ClientTLS(ca=ours.ca))


@pytest.mark.parametrize("num_bytes", [20_000, 200_000, 2_000_000])
def test_large_metadata_is_refused_and_small_is_not(router: LiveRouter, num_bytes: int) -> None:
    with grpc.insecure_channel(router.address) as channel:
        describe = channel.unary_unary("/moe_runtime.v1.Router/Describe")
        question = bytes.fromhex("81a870726f746f636f6c920100")
        with pytest.raises(grpc.RpcError) as caught:
            describe(question, metadata=[("x-large", "x" * num_bytes)], timeout=20)
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        describe(question, metadata=[("x-small", "x" * 8_000)], timeout=20)
    expect_good_request(router.address)


def test_many_small_metadata_entries_are_refused(router: LiveRouter) -> None:
    many = [(f"x-{i}", "v") for i in range(2_000)]
    with grpc.insecure_channel(router.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/moe_runtime.v1.Router/Describe")(b"", metadata=many, timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    expect_good_request(router.address)


def test_both_token_and_certificate_are_asked_for(
    start_router: StartRouter, ours: CertificateFiles, tmp_path: Path
) -> None:
    tokens = write_tokens(tmp_path / "tokens.yaml")
    tls = tls_config(ours, mutual=True).tls
    live = start_router(security=SecurityConfig(tls=tls, tokens=str(tokens)))
    with MoEClient(live.address, tls=client_tls(ours)) as client, pytest.raises(UnauthenticatedError):
        client.forward(ROWS, layer="vectors", timeout_s=20)
    expect_unavailable(live.address, ClientTLS(ca=ours.ca))
    expect_good_request(live.address, token=ALICE, tls=client_tls(ours))


def install(source: CertificateFiles, folder: Path) -> TLSConfig:
    """Put a router's certificate where a configuration names it, as an operator does: each file at once."""
    folder.mkdir(exist_ok=True)
    for file in (source.server, source.server_key):
        part = folder / f"{file.name}.part"
        shutil.copy(file, part)
        part.replace(folder / file.name)
    return TLSConfig(cert=str(folder / source.server.name), key=str(folder / source.server_key.name))


def test_replaced_certificate_is_shown_to_the_next_connection(
    start_router: StartRouter, ours: CertificateFiles, theirs: CertificateFiles, tmp_path: Path
) -> None:
    live = start_router(security=SecurityConfig(tls=install(ours, tmp_path / "tls")))
    with MoEClient(live.address, tls=ClientTLS(ca=ours.ca)) as open_client:
        open_client.describe(timeout_s=20)
        install(theirs, tmp_path / "tls")
        answered = False
        while not answered:
            with MoEClient(live.address, tls=ClientTLS(ca=theirs.ca), retry_policy=ONCE) as client:
                try:
                    client.forward(ROWS, layer="vectors", timeout_s=20)
                    answered = True
                except UnavailableError:
                    continue
        open_client.describe(timeout_s=20)
    expect_unavailable(live.address, ClientTLS(ca=ours.ca))
    expect_good_request(live.address, tls=ClientTLS(ca=theirs.ca))


def test_certificate_without_its_key_is_not_shown(
    ours: CertificateFiles, theirs: CertificateFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moe_runtime.rpc.reloading import Reloaded

    clock = FakeClock()
    tls = install(ours, tmp_path / "tls")
    files = Reloaded([tls.cert, tls.key], lambda: _read(tls), now=clock.now)
    first = files.current()
    shutil.copy(theirs.server, tls.cert)
    clock.advance(1.0)
    with caplog.at_level(logging.ERROR):
        assert files.current() is first
    assert "unencrypted key" in caplog.text
    install(theirs, tmp_path / "tls")
    clock.advance(1.0)
    assert files.current().cert == theirs.server.read_bytes()
    assert "PRIVATE" not in repr(files.current())


def test_key_that_others_can_read_is_refused(start_router: StartRouter, ours: CertificateFiles, tmp_path: Path) -> None:
    tls = install(ours, tmp_path / "tls")
    Path(tls.key).chmod(0o640)
    with pytest.raises(ConfigError, match="found mode 0640; chmod 600"):
        start_router(security=SecurityConfig(tls=tls))


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_file_that_is_no_certificate_is_refused(
    start_router: StartRouter, ours: CertificateFiles, tmp_path: Path, content: bytes
) -> None:
    tls = install(ours, tmp_path / "tls")
    other = tmp_path / "other.crt"
    other.write_bytes(content)
    with pytest.raises(ConfigError, match="expected a PEM certificate"):
        start_router(security=SecurityConfig(tls=tls.model_copy(update={"cert": str(other)})))
    with pytest.raises(ConfigError, match="expected PEM certificates of CAs"):
        start_router(security=SecurityConfig(tls=tls.model_copy(update={"client_ca": str(other)})))
    with pytest.raises(ConfigError, match="expected a file"):
        start_router(security=SecurityConfig(tls=tls.model_copy(update={"cert": str(tmp_path / "none")})))


def test_client_s_files_are_checked_when_it_is_made(ours: CertificateFiles, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"tls\.ca: expected a PEM file"):
        MoEClient("127.0.0.1:1", tls=ClientTLS(ca=tmp_path / "none"))
    with pytest.raises(InvalidRequestError, match="both cert and key"):
        MoEClient("127.0.0.1:1", tls=ClientTLS(ca=ours.ca, cert=ours.client))


def test_plain_client_s_errors_are_typed(encrypted: LiveRouter) -> None:
    with MoEClient(encrypted.address, retry_policy=ONCE) as client, pytest.raises(MoERuntimeError) as caught:
        client.describe(timeout_s=20)
    assert not isinstance(caught.value, ProtocolVersionError)
