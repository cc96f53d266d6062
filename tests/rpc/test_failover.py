"""Routers that are really killed and frozen, as their clients see it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fakes import host_process
from fakes.host_process import ChildProcess
from fakes.live_router import WIDTH
from moe_runtime.errors import UnavailableError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.retries import RetryPolicy

ROWS = np.ones((2, WIDTH), np.float32)
DEADLINE_S = 20.0
#: A second on a machine that is not busy; less than half of the deadline in any case.
FAILOVER_S = 8.0


class RouterInProcess:
    """A router in a process of its own."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.process = ChildProcess(host_process.route, address)
        self.address = str(self.process.expect())

    def wait_for_dispatch(self) -> None:
        self.process.pipe.send("wait")
        self.process.expect()

    def free(self) -> None:
        self.process.pipe.send("free")


StartProcess = Callable[..., RouterInProcess]


@pytest.fixture
def start() -> Iterator[StartProcess]:
    started: list[RouterInProcess] = []

    def start(address: str = "127.0.0.1:0") -> RouterInProcess:
        started.append(RouterInProcess(address))
        return started[-1]

    yield start
    for router in started:
        router.process.close()


@pytest.mark.parametrize("end", [ChildProcess.kill, ChildProcess.freeze])
def test_call_under_way_at_a_router_that_ends_is_answered_by_another_within_its_deadline(
    start: StartProcess, end: Callable[[ChildProcess], None]
) -> None:
    ending, living = start(), start()
    living.free()
    with MoEClient([ending.address, living.address]) as client, ThreadPoolExecutor(1) as background:
        call = background.submit(client.forward, ROWS, layer="stuck", timeout_s=DEADLINE_S)
        ending.wait_for_dispatch()
        end(ending.process)
        ended_at = time.monotonic()
        assert call.result().report.num_served == 4
        assert time.monotonic() - ended_at < FAILOVER_S
        # Nobody asks it again: in turn with the other, every second call would wait for it.
        times_s = []
        for _ in range(20):
            began_at = time.monotonic()
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
            times_s.append(time.monotonic() - began_at)
        assert sum(time_s > 0.5 for time_s in times_s) <= 3


async def test_asynchronous_call_under_way_at_a_killed_router_is_answered_by_another(start: StartProcess) -> None:
    ending, living = start(), start()
    async with AsyncMoEClient([ending.address, living.address]) as client:
        await client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        await client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        ending.process.kill()
        began_at = time.monotonic()
        for _ in range(20):
            assert (await client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)).report.num_served == 4
        assert time.monotonic() - began_at < FAILOVER_S


def test_router_frozen_before_it_was_ever_called_costs_no_call(start: StartProcess) -> None:
    frozen, living = start(), start()
    frozen.process.freeze()
    with MoEClient([frozen.address, living.address]) as client:
        began_at = time.monotonic()
        assert client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S).report.num_served == 4
        assert time.monotonic() - began_at < FAILOVER_S


def test_router_that_is_back_at_its_address_is_used_again(start: StartProcess) -> None:
    first, other = start(), start()
    with MoEClient([first.address, other.address]) as client:
        for _ in range(2):
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        first.process.kill()
        for _ in range(2):
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        first.process.close()
        again = start(first.address)
        again_at = time.monotonic()
        # It is asked as soon as it is connected; the calls meanwhile go to the other.
        with ThreadPoolExecutor(1) as background:
            seen = background.submit(again.wait_for_dispatch)
            while not seen.done():
                client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        seen.result()
        assert time.monotonic() - again_at < FAILOVER_S


def test_thawed_router_is_used_again(start: StartProcess) -> None:
    frozen, other = start(), start()
    with MoEClient([frozen.address, other.address]) as client:
        frozen.process.freeze()
        for _ in range(2):
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        frozen.process.thaw()
        with ThreadPoolExecutor(1) as background:
            seen = background.submit(frozen.wait_for_dispatch)
            while not seen.done():
                client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        seen.result()


def test_many_callers_lose_nothing_when_one_of_two_routers_is_killed(start: StartProcess) -> None:
    ending, living = start(), start()
    outcomes: Counter[str] = Counter()
    under_way, killed = threading.Barrier(9), threading.Event()

    def call_often(client: MoEClient) -> None:
        client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
        under_way.wait()
        while not killed.is_set():
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
            outcomes["before"] += 1
        for _ in range(10):
            client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
            outcomes["after"] += 1

    with MoEClient([ending.address, living.address]) as client, ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(call_often, client) for _ in range(8)]
        under_way.wait()
        ending.process.kill()
        killed.set()
        for call in calls:
            call.result()
    assert outcomes["after"] == 80


def test_routers_that_are_all_gone_see_no_storm_of_retries(start: StartProcess) -> None:
    gone = start()
    gone.process.close()
    policy = RetryPolicy(max_attempts=4, first_backoff_s=0.0, budget=5, earned_per_success=0.1)
    num_attempts = 0
    with MoEClient(gone.address, retry_policy=policy) as client:
        for _ in range(30):
            with pytest.raises(UnavailableError) as caught:
                client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S)
            num_attempts += int(caught.value.__notes__[0].split()[1])
    assert num_attempts == 30 + 5
