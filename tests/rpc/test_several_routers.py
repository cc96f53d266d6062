"""A client with several routers takes them in turn, goes around those that are down, and comes back."""

from __future__ import annotations

import numpy as np
import pytest

from fakes.live_router import WIDTH, LiveRouter, StartRouter
from moe_runtime.errors import UnavailableError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.retries import RetryPolicy

ROWS = np.ones((2, WIDTH), np.float32)


def answered(live: LiveRouter) -> int:
    return live.service.status()["num_answered"]


def test_routers_take_turns(start_router: StartRouter) -> None:
    routers = [start_router(), start_router()]
    with MoEClient([live.address for live in routers]) as client:
        for _ in range(6):
            client.forward(ROWS, layer="vectors", timeout_s=20)
    assert [answered(live) for live in routers] == [3, 3]


async def test_loss_of_a_router_costs_no_request(start_router: StartRouter) -> None:
    dying, living = start_router(), start_router()
    async with AsyncMoEClient([dying.address, living.address]) as client:
        await client.forward(ROWS, layer="vectors", timeout_s=20)
        dying.stop()
        for _ in range(6):
            assert (await client.forward(ROWS, layer="vectors", timeout_s=20)).report.num_served == 4
    assert answered(living) >= 6


def test_draining_router_sends_its_clients_to_the_next(start_router: StartRouter) -> None:
    draining, living = start_router(), start_router()
    draining.service.drain(20.0)
    with MoEClient([draining.address, living.address]) as client:
        client.forward(ROWS, layer="vectors", timeout_s=20)
    assert answered(living) == 1


def test_no_router_at_all_is_unavailable_after_the_retries(start_router: StartRouter) -> None:
    gone = start_router()
    gone.stop()
    policy = RetryPolicy(max_attempts=3, first_backoff_s=0.001)
    with MoEClient(gone.address, retry_policy=policy) as client, pytest.raises(UnavailableError) as caught:
        client.forward(ROWS, layer="vectors", timeout_s=20)
    assert gone.address in "".join(caught.value.__notes__)
    assert "3 attempts" in "".join(caught.value.__notes__)


async def test_closed_client_says_so(start_router: StartRouter) -> None:
    live = start_router()
    client = MoEClient(live.address)
    client.close()
    with pytest.raises(UnavailableError, match="found this one closed"):
        client.describe()
    aio_client = AsyncMoEClient(live.address)
    await aio_client.close()
    with pytest.raises(UnavailableError, match="found this one closed"):
        await aio_client.describe()
