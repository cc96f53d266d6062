"""What a client decides, told by its core alone: a clock that stands still, and no network."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fakes.service import FakeClock
from moe_runtime.errors import (
    DeadlineExceededError,
    DTypeError,
    InvalidRequestError,
    MoERuntimeError,
    OverloadedError,
    ProtocolError,
    ShapeError,
    StreamRequiredError,
    UnavailableError,
)
from moe_runtime.rpc.balancing import AddressPool, addresses_of
from moe_runtime.rpc.client_core import ClientCall, ClientCore
from moe_runtime.rpc.methods import FORWARD, FORWARD_STREAM, UNARY_BYTES
from moe_runtime.rpc.retries import RetryBudget, RetryPolicy
from moe_runtime.wire.codec import decode_request
from moe_runtime.wire.messages import ForwardResult, RequestOptions

ROWS = np.ones((2, 4), np.float32)
UNAVAILABLE = UnavailableError("connection refused")
POLICY = RetryPolicy(max_attempts=4, first_backoff_s=0.1, max_backoff_s=0.3)


class Setting:
    """A core under a clock of the test's."""

    def __init__(self, *targets: str, policy: RetryPolicy = POLICY) -> None:
        self.clock = FakeClock()
        self.core = ClientCore(targets or ("a:1",), retry_policy=policy, now=self.clock.now, rng=random.Random(0))

    def call(self, *, timeout_s: float | None = None, inputs: Any = ROWS, **options: Any) -> ClientCall[ForwardResult]:
        return self.core.forward(
            inputs,
            layer="vectors",
            options=RequestOptions(**options),
            timeout_s=timeout_s,
            return_routing=False,
        )


def test_small_request_is_one_message_and_a_large_one_a_stream() -> None:
    setting = Setting()
    assert setting.call().attempt.method == FORWARD
    large = np.ones((UNARY_BYTES // 4, 1), np.float32)
    assert setting.call(inputs=large).attempt.method == FORWARD_STREAM


def test_answer_that_needs_a_stream_is_asked_for_again_at_once_as_one() -> None:
    call = Setting(policy=RetryPolicy(max_attempts=1, budget=0)).call()
    before = call.attempt
    call.failed(StreamRequiredError("too long"))
    assert (call.attempt.method, call.attempt.delay_s) == (FORWARD_STREAM, 0.0)
    assert call.attempt.body == before.body


def test_request_id_is_kept_over_retries_and_new_for_each_call() -> None:
    setting = Setting()
    call, other = setting.call(), setting.call()
    first = decode_request(call.attempt.body).request_id
    call.failed(UNAVAILABLE)
    assert decode_request(call.attempt.body).request_id == first
    assert decode_request(other.attempt.body).request_id != first


def test_backoff_doubles_up_to_its_maximum_within_its_jitter() -> None:
    call = Setting().call()
    for longest_s in (0.1, 0.2, 0.3):
        call.failed(UNAVAILABLE)
        assert longest_s / 2 <= call.attempt.delay_s <= longest_s
    with pytest.raises(UnavailableError) as caught:
        call.failed(UNAVAILABLE)
    (note,) = caught.value.__notes__
    assert note.startswith("after 4 attempts, the last at a:1; request ")


def test_another_router_is_tried_without_a_pause() -> None:
    call = Setting("a:1", "b:1").call()
    call.failed(UNAVAILABLE)
    assert (call.attempt.address, call.attempt.delay_s) == ("b:1", 0.0)
    call.failed(UNAVAILABLE)
    assert call.attempt.delay_s > 0


@pytest.mark.parametrize("error", [ShapeError("wrong"), DeadlineExceededError("late"), MoERuntimeError("odd")])
def test_error_that_a_retry_would_not_help_is_raised_at_once(error: MoERuntimeError) -> None:
    call = Setting().call()
    with pytest.raises(type(error)):
        call.failed(error)


def test_overloaded_call_waits_as_long_as_the_hint_says() -> None:
    call = Setting().call(timeout_s=10)
    call.failed(OverloadedError("full", retry_after_ms=2000))
    assert call.attempt.delay_s == 2.0
    assert call.attempt.timeout_s == pytest.approx(8.0)


def test_overloaded_call_whose_hint_exceeds_the_deadline_is_raised() -> None:
    call = Setting().call(timeout_s=1)
    with pytest.raises(OverloadedError):
        call.failed(OverloadedError("full", retry_after_ms=2000))


def test_overloaded_call_without_a_deadline_does_not_wait_for_minutes() -> None:
    call = Setting().call()
    with pytest.raises(OverloadedError):
        call.failed(OverloadedError("full", retry_after_ms=120_000))


def test_deadline_covers_all_attempts() -> None:
    setting = Setting()
    call = setting.call(timeout_s=1.0)
    assert call.attempt.timeout_s == 1.0
    setting.clock.advance(0.6)
    call.failed(UNAVAILABLE)
    assert call.attempt.timeout_s == pytest.approx(0.4 - call.attempt.delay_s)
    setting.clock.advance(0.5)
    with pytest.raises(UnavailableError):
        call.failed(UNAVAILABLE)


def test_stream_is_not_started_after_the_deadline() -> None:
    setting = Setting()
    call = setting.call(timeout_s=1.0)
    setting.clock.advance(1.0)
    with pytest.raises(DeadlineExceededError):
        call.failed(StreamRequiredError("too long"))


def test_call_without_a_deadline_sends_none() -> None:
    assert Setting().call().attempt.timeout_s is None


@pytest.mark.parametrize("timeout_s", [float("nan"), True, "1"])
def test_timeout_that_is_no_number_is_refused(timeout_s: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        Setting().call(timeout_s=timeout_s)


def test_retries_of_all_calls_share_one_budget() -> None:
    setting = Setting(policy=RetryPolicy(budget=2))
    setting.call().failed(UNAVAILABLE)
    setting.call().failed(UNAVAILABLE)
    with pytest.raises(UnavailableError):
        setting.call().failed(UNAVAILABLE)


def test_any_number_of_calls_lost_with_one_router_go_on_to_another_once_at_no_cost() -> None:
    setting = Setting("a:1", "b:1", policy=RetryPolicy(max_attempts=4, budget=1))
    calls = [call for call in (setting.call() for _ in range(20)) if call.attempt.address == "a:1"]
    for call in calls:
        call.failed(UNAVAILABLE, is_lost=True)
        assert (call.attempt.address, call.attempt.delay_s) == ("b:1", 0.0)
    # The other is lost as well: now nobody is left, and one retry is.
    calls[0].failed(UNAVAILABLE, is_lost=True)
    for call in calls[1:]:
        with pytest.raises(UnavailableError):
            call.failed(UNAVAILABLE, is_lost=True)


def test_lost_router_rests_until_it_is_connected_and_one_that_refuses_for_a_while() -> None:
    clock = FakeClock()
    pool = AddressPool(("a:1", "b:1"), now=clock.now)
    pool.mark_lost("a:1")
    clock.advance(3600.0)
    assert [pool.pick() for _ in range(3)] == ["b:1", "b:1", "b:1"]
    pool.mark_connected("a:1")
    assert {pool.pick(), pool.pick()} == {"a:1", "b:1"}
    pool.mark_failed("a:1")
    pool.mark_connected("a:1")
    assert [pool.pick() for _ in range(2)] == ["b:1", "b:1"]
    clock.advance(0.6)
    assert {pool.pick(), pool.pick()} == {"a:1", "b:1"}


def test_successes_earn_retries_up_to_the_budget() -> None:
    budget = RetryBudget(RetryPolicy(budget=1, earned_per_success=0.5))
    budget.earn()
    assert [budget.spend(), budget.spend()] == [True, False]
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()


def test_reply_that_is_no_reply_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        Setting().call().succeeded(b"\xc1")


def test_inputs_that_are_no_array_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"^inputs: expected a numpy array or a torch tensor, found list$"):
        Setting().call(inputs=[[1.0]])


def test_array_of_a_dtype_that_the_wire_lacks_is_refused() -> None:
    with pytest.raises(DTypeError):
        Setting().call(inputs=np.array(["a"]))


def test_failed_router_is_skipped_longer_each_time_and_then_tried_again() -> None:
    clock = FakeClock()
    pool = AddressPool(("a:1", "b:1"), now=clock.now)
    pool.mark_failed("a:1")
    assert [pool.pick() for _ in range(3)] == ["b:1"] * 3
    clock.advance(0.5)
    assert pool.pick() == "a:1"
    pool.mark_failed("a:1")
    clock.advance(0.9)
    assert [pool.pick() for _ in range(2)] == ["b:1"] * 2
    clock.advance(0.1)
    assert pool.pick() == "a:1"
    pool.mark_answered("a:1")
    pool.mark_failed("a:1")
    clock.advance(0.5)
    assert {pool.pick(), pool.pick()} == {"a:1", "b:1"}


def test_pause_of_a_failed_router_has_a_maximum() -> None:
    clock = FakeClock()
    pool = AddressPool(("a:1",), now=clock.now)
    for _ in range(40):
        pool.mark_failed("a:1")
    assert not pool.has_usable()
    clock.advance(10.0)
    assert pool.has_usable()


def test_where_all_routers_failed_the_first_to_recover_is_picked() -> None:
    clock = FakeClock()
    pool = AddressPool(("a:1", "b:1"), now=clock.now)
    pool.mark_failed("b:1")
    clock.advance(0.2)
    pool.mark_failed("a:1")
    assert [pool.pick(), pool.pick()] == ["b:1", "b:1"]


def test_target_is_one_address_or_several() -> None:
    assert addresses_of("router:50051") == ("router:50051",)
    assert addresses_of(["a:1", "[::1]:2", "a:1"]) == ("a:1", "[::1]:2")


@pytest.mark.parametrize("target", ["", "router", ":1", "router:0", "router:65536", "router:x", [], ["a:1", 7]])
def test_target_that_is_no_address_is_refused(target: Any) -> None:
    with pytest.raises(InvalidRequestError, match="target"):
        ClientCore(target, retry_policy=POLICY)


@pytest.mark.parametrize("target", [None, 5])
def test_a_target_that_is_neither_text_nor_a_list_is_refused(target: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^target: expected HOST:PORT or a list of them, found {target}$"):
        addresses_of(target)
