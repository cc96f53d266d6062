from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes.live_router import LiveRouter, StartRouter
from fakes.malformed import GOOD
from fakes.secured import (
    ALICE,
    BOB,
    ENTRIES,
    METRICS,
    OLD,
    ROWS,
    exchange_raw,
    expect_good_request,
    raw_call,
    write_tokens,
)
from fakes.service import FakeClock
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.errors import (
    ConfigError,
    InvalidRequestError,
    MoERuntimeError,
    PermissionDeniedError,
    ProtocolVersionError,
    UnauthenticatedError,
)
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.methods import DESCRIBE, ERROR_KEY, FORWARD, FORWARD_STREAM, STATUS, path
from moe_runtime.rpc.tokens import TokenFile, read_tokens

CODES = grpc.StatusCode


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRouter]:
    """A router in plain text that asks for tokens."""
    tokens = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.yaml")
    security = SecurityConfig(tokens=str(tokens))
    live = LiveRouter(limits=LimitsConfig(), router=RouterConfig(), security=security).start()
    yield live
    live.stop()


def code_of(address: str, method: str, metadata: list[tuple[str, str]], body: bytes = GOOD) -> grpc.StatusCode:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method).with_call if method != path(FORWARD_STREAM) else None
        try:
            if call is None:
                list(channel.stream_stream(method)(iter([body]), metadata=metadata, timeout=20))
            else:
                call(body, metadata=metadata, timeout=20)
        except grpc.RpcError as exc:
            return exc.code()
    return CODES.OK


@pytest.mark.parametrize("method", [FORWARD, FORWARD_STREAM, DESCRIBE, STATUS, "Nonsense"])
@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {'z' * 26}")],
        [("authorization", f"Bearer {ALICE[:-1]}")],
        [("authorization", f"Bearer {OLD}")],
        [("authorization", f"Basic {ALICE}")],
        [("authorization", ALICE)],
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")],
        [("x-token", ALICE)],
    ],
    ids=["none", "empty", "no-token", "unknown", "cut", "expired", "other-scheme", "no-scheme", "two", "other-key"],
)
def test_caller_without_a_good_token_is_unauthenticated(
    guarded: LiveRouter, method: str, metadata: list[tuple[str, str]]
) -> None:
    assert code_of(guarded.address, path(method), metadata) is CODES.UNAUTHENTICATED
    expect_good_request(guarded.address, token=ALICE)


@pytest.mark.parametrize(
    ("method", "token", "allowed"),
    [
        (FORWARD, ALICE, True),
        (FORWARD, BOB, True),
        (FORWARD, METRICS, False),
        (FORWARD_STREAM, ALICE, True),
        (FORWARD_STREAM, METRICS, False),
        (DESCRIBE, METRICS, True),
        (STATUS, METRICS, True),
        (STATUS, ALICE, True),
    ],
)
def test_scope_decides_what_a_token_is_good_for(guarded: LiveRouter, method: str, token: str, allowed: bool) -> None:
    body = GOOD if method.startswith(FORWARD) else bytes.fromhex("81a870726f746f636f6c920100")
    code = code_of(guarded.address, path(method), [("authorization", f"Bearer {token}")], body)
    assert code is (CODES.OK if allowed else CODES.PERMISSION_DENIED)
    expect_good_request(guarded.address, token=ALICE)


def test_client_raises_what_the_router_refused(guarded: LiveRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_RUNTIME_TOKEN", raising=False)
    with MoEClient(guarded.address) as client, pytest.raises(UnauthenticatedError, match="expected a token"):
        client.forward(ROWS, layer="vectors", timeout_s=20)
    with MoEClient(guarded.address, token=OLD) as client, pytest.raises(UnauthenticatedError, match="2020-01-31"):
        client.describe(timeout_s=20)
    with MoEClient(guarded.address, token=METRICS) as client:
        assert client.status(timeout_s=20)["rpc"]["num_errors"]["UnauthenticatedError"] > 0
        with pytest.raises(PermissionDeniedError, match="infer"):
            client.forward(ROWS, layer="vectors", timeout_s=20)
    monkeypatch.setenv("MOE_RUNTIME_TOKEN", BOB)
    expect_good_request(guarded.address)


async def test_asyncio_client_shows_its_token_too(guarded: LiveRouter) -> None:
    async with AsyncMoEClient(guarded.address, token=ALICE) as client:
        await client.forward(ROWS, layer="vectors", timeout_s=20)
    async with AsyncMoEClient(guarded.address, token="z" * 20) as client:
        with pytest.raises(UnauthenticatedError):
            await client.forward(ROWS, layer="vectors", timeout_s=20)


def test_non_ascii_token_is_refused_by_the_client_and_by_the_router(guarded: LiveRouter) -> None:
    with pytest.raises(InvalidRequestError, match="visible ASCII"):
        MoEClient(guarded.address, token="tökén-" * 5)
    for token in (b"t\xf6k\xe9n-" * 5, "tökén-".encode() * 5, b"\xff\xfe" * 10):
        sent = raw_call(path(FORWARD), {b"authorization": b"Bearer " + token})
        answer = exchange_raw(guarded.address, sent)
        assert b"UnauthenticatedError" in answer
        assert token not in answer
        expect_good_request(guarded.address, token=ALICE)


def test_token_in_raw_frames_is_let_in(guarded: LiveRouter) -> None:
    sent = raw_call(path(FORWARD), {b"authorization": b"Bearer " + ALICE.encode()})
    answer = exchange_raw(guarded.address, sent)
    # Let in, and told that an empty body is no request.
    assert b"ProtocolError" in answer


def test_health_can_be_asked_by_everybody_and_watched_by_those_with_a_token(guarded: LiveRouter) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=20))
        assert caught.value.code() is CODES.UNAUTHENTICATED
        watch = stub.Watch(
            health_pb2.HealthCheckRequest(), timeout=20, metadata=[("authorization", f"Bearer {METRICS}")]
        )
        assert next(watch).status == 1
        watch.cancel()


def test_unknown_method_is_not_told_from_others_without_a_token(guarded: LiveRouter) -> None:
    assert code_of(guarded.address, "/no.such/Method", []) is CODES.UNAUTHENTICATED
    with_token = [("authorization", f"Bearer {ALICE}")]
    assert code_of(guarded.address, "/no.such/Method", with_token) is CODES.PERMISSION_DENIED
    assert code_of(guarded.address, "/no.such/Method", [("authorization", f"Bearer {BOB}")]) is CODES.UNIMPLEMENTED
    expect_good_request(guarded.address, token=ALICE)


def test_refusal_comes_before_the_body(guarded: LiveRouter) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1 << 20)

    with grpc.insecure_channel(guarded.address) as channel:
        call = channel.stream_stream(path(FORWARD_STREAM))(endless(), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is CODES.UNAUTHENTICATED
    assert dict(caught.value.trailing_metadata())[ERROR_KEY] == "UnauthenticatedError"
    expect_good_request(guarded.address, token=ALICE)


def test_tokens_are_neither_logged_nor_shown(guarded: LiveRouter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="moe_runtime"), MoEClient(guarded.address, token=ALICE) as client:
        client.forward(ROWS, layer="vectors", timeout_s=20)
        with MoEClient(guarded.address, token="wrong-" * 5) as stranger, pytest.raises(UnauthenticatedError) as caught:
            stranger.forward(ROWS, layer="vectors", timeout_s=20)
        shown = repr(client._connector) + str(caught.value) + str(client.describe()) + str(client.status())
    assert ALICE not in caplog.text + shown
    assert "wrong-wrong" not in caplog.text + shown
    assert "refused a call from 127.0.0.1" in caplog.text


def test_router_with_tokens_that_cannot_be_used_does_not_start(start_router: StartRouter, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens.yaml", mode=0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        start_router(security=SecurityConfig(tokens=str(tokens)))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_changed_tokens_count_within_a_second_and_broken_ones_do_not(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tokens(tmp_path / "tokens.yaml")
    file = TokenFile(path, now=clock.now)
    carol = "carol-" * 5
    with pytest.raises(UnauthenticatedError):
        file.authenticate(carol)
    write_tokens(path, [*ENTRIES, {"name": "carol", "token": carol, "scopes": ["infer"]}])
    with pytest.raises(UnauthenticatedError):
        file.authenticate(carol)
    clock.advance(1.0)
    assert file.authenticate(carol).name == "carol"
    for broken in ("- {name: carol, token: *secret-alias, scopes: [infer]}", "[]", json_without_scopes(carol)):
        write_tokens(path, broken)
        clock.advance(1.0)
        assert file.authenticate(carol).name == "carol"
        assert caplog.records[-1].levelname == "ERROR"
        num_records = len(caplog.records)
        clock.advance(1.0)
        assert file.authenticate(ALICE).name == "alice"
        assert len(caplog.records) == num_records
    path.unlink()
    clock.advance(1.0)
    assert file.authenticate(carol).name == "carol"
    write_tokens(path, ENTRIES)
    clock.advance(1.0)
    with pytest.raises(UnauthenticatedError):
        file.authenticate(carol)
    assert "secret-alias" not in caplog.text
    assert carol not in caplog.text


def json_without_scopes(token: str) -> str:
    return f'[{{"name": "carol", "token": "{token}"}}]'


def test_reload_is_seen_over_a_channel(start_router: StartRouter, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml")
    live = start_router(security=SecurityConfig(tokens=str(path)))
    expect_good_request(live.address, token=ALICE)
    fresh = "fresh-" * 5
    write_tokens(path, [{"name": "fresh", "token": fresh, "scopes": ["infer"]}])
    with MoEClient(live.address, token=fresh) as client:
        answered = False
        while not answered:
            try:
                client.describe(timeout_s=20)
                answered = True
            except UnauthenticatedError:
                continue
    with MoEClient(live.address, token=ALICE) as client, pytest.raises(UnauthenticatedError):
        client.forward(ROWS, layer="vectors", timeout_s=20)
    expect_good_request(live.address, token=fresh)


def test_token_is_good_on_its_last_day_and_not_after(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml")
    assert TokenFile(path, today=lambda: datetime.date(2020, 1, 31)).authenticate(OLD).name == "old"
    with pytest.raises(UnauthenticatedError, match="expired"):
        TokenFile(path, today=lambda: datetime.date(2020, 2, 1)).authenticate(OLD)


def test_metrics_are_for_tokens_with_their_scope_and_for_admins(tmp_path: Path) -> None:
    file = TokenFile(write_tokens(tmp_path / "tokens.yaml"))
    allowed = [shown for shown in (None, "", ALICE, BOB, OLD, METRICS, "z" * 20) if file.lets_scrape(shown)]
    assert allowed == [BOB, METRICS]


def test_token_may_be_kept_as_its_hash(tmp_path: Path) -> None:
    text = f"- {{name: carol, sha256: {hashlib.sha256(ALICE.encode()).hexdigest()}, scopes: [admin]}}"
    file = TokenFile(write_tokens(tmp_path / "tokens.yaml", text))
    assert file.authenticate(ALICE).scopes == {"admin"}
    assert ALICE not in repr(read_tokens(tmp_path / "tokens.yaml"))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"name": "a"}, "expected a list of tokens"),
        ([], "expected a list of tokens"),
        ("- [", "expected a YAML or JSON document"),
        ([{"name": "a", "token": "short", "scopes": ["infer"]}], r"0\.token: expected a text that matches"),
        ([{"name": "a", "token": 10**30, "scopes": ["infer"]}], r"0\.token"),
        ([{"name": "a", "token": "secret" * 4, "scopes": ["all"]}], r"0\.scopes\.0: expected infer, admin or metrics$"),
        ([{"name": "a", "token": "secret" * 4, "scopes": []}], r"0\.scopes: expected 1 or more entries$"),
        ([{"name": "a", "sha256": "secret", "scopes": ["infer"]}], r"0\.sha256"),
        ([{"name": "a", "scopes": ["infer"]}], "expected token or sha256"),
        ([{"name": "a", "tokn": "secret" * 4, "scopes": ["infer"]}], r"0\.tokn: unknown key; did you mean token\?"),
        ([{"name": "a", "token": "secret" * 4, "scopes": ["infer"], "expires": "soon"}], r"0\.expires"),
        ([*ENTRIES, ENTRIES[0]], "expected each name once"),
        ([*ENTRIES, {**ENTRIES[0], "name": "twin"}], "expected each token once"),
        (["secret" * 4], "0: "),
    ],
)
def test_mistake_in_the_tokens_is_told_without_showing_any(tmp_path: Path, entries: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        read_tokens(write_tokens(tmp_path / "tokens.yaml", entries))
    assert "secret" not in str(caught.value)
    assert all(entry["token"] not in str(caught.value) for entry in ENTRIES)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_tokens_that_others_can_read_are_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"found mode {mode:04o}; chmod 600"):
        read_tokens(write_tokens(tmp_path / "tokens.yaml", mode=mode))


@pytest.mark.parametrize("address", ["10.0.0.7:50051", "router.example:50051", "0.0.0.0:50051", "[2001:db8::1]:50051"])
def test_client_sends_no_token_in_plain_text_to_other_machines(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="expected TLS to"):
        MoEClient(address, token=ALICE)
    with pytest.raises(InvalidRequestError, match="expected TLS to"):
        MoEClient(["127.0.0.1:1", address], token=ALICE)
    MoEClient(address, token=ALICE, tls=True).close()
    MoEClient(address, token=ALICE, insecure=True).close()
    MoEClient(address, token="").close()


def test_no_proxy_sees_calls_to_this_machine(guarded: LiveRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    expect_good_request(guarded.address, token=ALICE)


def test_refused_call_is_a_moe_runtime_error_that_is_not_retried(guarded: LiveRouter) -> None:
    with MoEClient(guarded.address, token="") as client, pytest.raises(MoERuntimeError) as caught:
        client.forward(ROWS, layer="vectors", timeout_s=20)
    assert not isinstance(caught.value, ProtocolVersionError)
    (note,) = caught.value.__notes__
    assert note.startswith("after 1 attempts, ")
