"""What a router takes in of streams that are still arriving is bounded, and given back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack

import pytest

from moe_runtime.config.runtime import LimitsConfig
from moe_runtime.errors import OverloadedError, RequestTooLargeError
from moe_runtime.rpc.intake import Intake


async def pieces(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield bytes(size)


async def test_bodies_that_arrive_together_are_bounded_and_give_their_place_back() -> None:
    intake = Intake(LimitsConfig(max_request_bytes=100))
    with ExitStack() as arriving:
        for _ in range(4):
            await arriving.enter_context(intake.streamed()).receive(pieces(50, 50))
        with intake.streamed() as fifth, pytest.raises(OverloadedError, match="arriving at once") as refused:
            await fifth.receive(pieces(1))
        assert refused.value.retry_after_ms > 0
    with intake.streamed() as body:
        assert len(await body.receive(pieces(60, 40))) == 100


async def test_bodies_that_came_in_one_piece_count_as_well_until_their_calls_end() -> None:
    intake = Intake(LimitsConfig(max_request_bytes=100))
    async with AsyncExitStack() as calls:
        for _ in range(4):
            await calls.enter_async_context(intake.admitted(20.0, num_bytes=100))
        with pytest.raises(OverloadedError, match="arriving at once"):
            await calls.enter_async_context(intake.admitted(20.0, num_bytes=1))
        with intake.streamed() as body, pytest.raises(OverloadedError, match="arriving at once"):
            await body.receive(pieces(1))
    async with intake.admitted(20.0, num_bytes=100):
        pass


async def test_body_is_refused_as_soon_as_it_is_too_large() -> None:
    intake = Intake(LimitsConfig(max_request_bytes=100))
    endless = pieces(*[60] * 1000)
    with intake.streamed() as body, pytest.raises(RequestTooLargeError, match="at most 100 bytes"):
        await body.receive(endless)
    assert len(body.content) == 60


def test_time_limit_is_the_asked_one_within_the_limits() -> None:
    intake = Intake(LimitsConfig(default_timeout_s=5, max_timeout_s=30))
    assert [intake.timeout_s(asked) for asked in (None, 7.0, 31.0)] == [5.0, 7.0, 30.0]
