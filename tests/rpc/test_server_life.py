"""Time, load and the end of a server: deadlines, cancellation, full queues, draining, ports, health, defects."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes.live_router import WIDTH, LiveRouter, StartRouter
from fakes.malformed import GOOD
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    RequestCancelledError,
    StartError,
    UnavailableError,
)
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.methods import ERROR_KEY, FORWARD, SERVICE, path
from moe_runtime.rpc.retries import RetryPolicy
from moe_runtime.rpc.server import RpcServer

ROWS = np.ones((2, WIDTH), np.float32)
NO_RETRIES = RetryPolicy(max_attempts=1)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def health_of(channel: grpc.Channel, service: str = SERVICE) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def is_dispatched(status: dict[str, Any]) -> bool:
    """Whether a batch has left the queue for good: its message was sent."""
    return status["num_messages"] == 1


def test_passed_deadline_is_an_error_and_leaves_nothing_in_the_router(start_router: StartRouter) -> None:
    live = start_router()
    with MoEClient(live.address) as client:
        with pytest.raises(DeadlineExceededError):
            client.forward(ROWS, layer="stuck", timeout_s=0.2)
        live.wait_for(lambda status: status["open_requests"] == 0)
        client.forward(ROWS, layer="vectors", timeout_s=20)


@pytest.mark.parametrize("timeout_s", [0, -1.0])
def test_deadline_that_lies_in_the_past_is_not_even_sent(router: LiveRouter, timeout_s: float) -> None:
    with MoEClient(router.address) as client, pytest.raises(DeadlineExceededError):
        client.forward(ROWS, layer="vectors", timeout_s=timeout_s)


def test_request_without_a_deadline_gets_the_default(start_router: StartRouter) -> None:
    live = start_router(limits=LimitsConfig(default_timeout_s=0.2))
    with MoEClient(live.address) as client, pytest.raises(DeadlineExceededError):
        client.forward(ROWS, layer="stuck")


@pytest.mark.parametrize("timeout_s", [3600.0, 1e300, float("inf")])
def test_huge_deadline_is_cut_to_the_maximum(start_router: StartRouter, timeout_s: float) -> None:
    live = start_router(limits=LimitsConfig(default_timeout_s=0.2, max_timeout_s=0.2))
    with MoEClient(live.address) as client, pytest.raises(DeadlineExceededError, match=r"0\.200 s|in the router"):
        client.forward(ROWS, layer="stuck", timeout_s=timeout_s)


def test_streamed_request_has_a_deadline_too(start_router: StartRouter) -> None:
    live = start_router()
    rows = np.ones((40_000, WIDTH), np.float32)
    with MoEClient(live.address) as client, pytest.raises(DeadlineExceededError):
        client.forward(rows, layer="wide", timeout_s=0.001)


async def test_cancelled_call_frees_its_work(start_router: StartRouter) -> None:
    live = start_router()
    async with AsyncMoEClient(live.address) as client:
        call = asyncio.create_task(client.forward(ROWS, layer="stuck", timeout_s=20))
        await asyncio.to_thread(live.wait_for, lambda status: is_dispatched(status))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(live.wait_for, lambda status: status["open_requests"] == 0)
        assert live.service.status()["num_cancelled"] == 1
        await client.forward(ROWS, layer="vectors", timeout_s=20)


def test_closing_a_client_cancels_its_calls(start_router: StartRouter, background: ThreadPoolExecutor) -> None:
    live = start_router()
    client = MoEClient(live.address)
    call = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
    live.wait_for(lambda status: is_dispatched(status))
    client.close()
    with pytest.raises(RequestCancelledError):
        call.result()
    live.wait_for(lambda status: status["num_cancelled"] == 1)


def test_full_queue_answers_overloaded_at_once_with_a_hint(
    start_router: StartRouter, background: ThreadPoolExecutor
) -> None:
    live = start_router(router=RouterConfig(max_queued_tokens=3, max_wait_ms=60_000))
    with MoEClient(live.address, retry_policy=NO_RETRIES) as client:
        dispatched = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: is_dispatched(status))
        queued = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: status["open_requests"] == 2)
        with pytest.raises(OverloadedError) as refused:
            client.forward(ROWS, layer="vectors", timeout_s=20)
        assert refused.value.retry_after_ms > 0
        live.free()
        assert dispatched.result().report.num_served == 4
        assert queued.result().report.num_served == 4
        client.forward(ROWS, layer="vectors", timeout_s=20)


def test_calls_above_the_limit_are_refused_and_health_still_answers(
    start_router: StartRouter, background: ThreadPoolExecutor
) -> None:
    live = start_router(limits=LimitsConfig(max_concurrent_requests=1))
    with MoEClient(live.address, retry_policy=NO_RETRIES) as client:
        held = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: is_dispatched(status))
        with pytest.raises(OverloadedError, match="holds 1 request"):
            client.forward(ROWS, layer="vectors", timeout_s=20)
        with grpc.insecure_channel(live.address) as channel:
            assert health_of(channel) == SERVING
        live.free()
        held.result()
        # The answer leaves before its place is free.
        live.wait_for(lambda status: status["open_requests"] == 0)
        client.forward(ROWS, layer="vectors", timeout_s=20)


def test_thousands_of_calls_at_once_each_get_an_answer_or_a_typed_refusal(start_router: StartRouter) -> None:
    live = start_router(limits=LimitsConfig(max_concurrent_requests=64))
    answers: Counter[str] = Counter()
    with grpc.insecure_channel(live.address) as channel:
        forward = channel.unary_unary(path(FORWARD))
        for call in [forward.future(GOOD, timeout=50) for _ in range(4000)]:
            code = call.code()
            named = ERROR_KEY in dict(call.trailing_metadata() or ())
            answers[f"{code.name}{' by name' if named else ''}"] += 1
    assert answers["OK"] >= 64
    assert set(answers) <= {"OK", "RESOURCE_EXHAUSTED by name", "RESOURCE_EXHAUSTED"}


def test_overloaded_call_succeeds_on_a_retry(start_router: StartRouter, background: ThreadPoolExecutor) -> None:
    live = start_router(limits=LimitsConfig(max_concurrent_requests=1))
    patient = RetryPolicy(max_attempts=1000, first_backoff_s=0.01, max_backoff_s=0.02, budget=1000)
    with MoEClient(live.address, retry_policy=patient) as client:
        held = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: is_dispatched(status))
        retried = background.submit(client.forward, ROWS, layer="vectors", timeout_s=20)
        refusals = "OverloadedError"
        while not client.status()["rpc"]["num_errors"].get(refusals):
            pass
        live.free()
        held.result()
        assert retried.result().report.num_served == 4


def test_draining_shows_in_health_and_lets_calls_go_on(start_router: StartRouter) -> None:
    live = start_router()
    with grpc.insecure_channel(live.address) as channel, MoEClient(live.address) as client:
        assert health_of(channel) == health_of(channel, "") == SERVING
        client.describe()
        live.server.drain()
        updates = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
        assert next(update.status for update in updates if update.status != SERVING) == NOT_SERVING
        updates.cancel()
        client.forward(ROWS, layer="vectors", timeout_s=20)


def test_draining_service_refuses_new_requests_as_unavailable(start_router: StartRouter) -> None:
    live = start_router()
    with MoEClient(live.address, retry_policy=NO_RETRIES) as client:
        client.forward(ROWS, layer="vectors", timeout_s=20)
        assert live.service.drain(20.0)
        with pytest.raises(UnavailableError, match="shutting down"):
            client.forward(ROWS, layer="vectors", timeout_s=20)


def test_stopping_lets_the_calls_under_way_finish(start_router: StartRouter, background: ThreadPoolExecutor) -> None:
    live = start_router()
    with MoEClient(live.address) as client:
        held = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: is_dispatched(status))
        stopping = background.submit(live.server.stop, 20.0)
        live.free()
        assert held.result().report.num_served == 4
        stopping.result()


def test_stopping_cancels_what_is_left_after_the_grace(
    start_router: StartRouter, background: ThreadPoolExecutor
) -> None:
    live = start_router()
    with MoEClient(live.address, retry_policy=NO_RETRIES) as client:
        held = background.submit(client.forward, ROWS, layer="stuck", timeout_s=20)
        live.wait_for(lambda status: is_dispatched(status))
        live.server.stop(0.0)
        with pytest.raises((UnavailableError, RequestCancelledError)):
            held.result()
        live.wait_for(lambda status: status["open_requests"] == 0)


def test_stopping_twice_or_before_the_start_is_harmless(start_router: StartRouter) -> None:
    live = start_router()
    live.server.stop(0.0)
    live.server.stop(0.0)
    RpcServer(live.service, address="127.0.0.1:0", limits=LimitsConfig(), info={}).stop(0.0)


def test_port_that_is_taken_is_a_clear_error(start_router: StartRouter) -> None:
    live = start_router()
    second = RpcServer(live.service, address=live.address, limits=LimitsConfig(), info={})
    with pytest.raises(StartError, match=f"bind {live.address}, found it taken"):
        second.start()
    second.stop(0.0)


def test_freed_port_can_be_bound_again(start_router: StartRouter) -> None:
    live = start_router()
    live.stop()
    again = start_router(address=live.address)
    with MoEClient(again.address) as client:
        assert client.describe(timeout_s=20)["name"] == "live"


def test_defect_in_the_router_tells_the_client_nothing_of_the_inside(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    live = start_router()
    secret = {"password": object()}
    server = RpcServer(live.service, address="127.0.0.1:0", limits=LimitsConfig(), info=secret)
    with MoEClient(server.start()) as client, caplog.at_level(logging.ERROR, "moe_runtime"):
        with pytest.raises(InternalError) as caught:
            client.describe(timeout_s=20)
        client.forward(ROWS, layer="vectors", timeout_s=20)
    server.stop(0.0)
    assert "object" not in str(caught.value)
    assert "Describe failed" in caplog.text
    assert "object" in caplog.text


def test_call_withdrawn_while_it_is_being_submitted_is_cancelled(start_router: StartRouter) -> None:
    live = start_router()
    body = GOOD.replace(b"\xa7vectors", b"\xa5stuck")
    with grpc.insecure_channel(live.address) as channel:
        calls = [channel.unary_unary(path(FORWARD)).future(body, timeout=20) for _ in range(50)]
        for call in calls:
            call.cancel()
    live.wait_for(lambda status: status["open_requests"] == 0)
