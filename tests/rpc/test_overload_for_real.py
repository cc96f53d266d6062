"""Three times the capacity, for real: gRPC, the service, and a host that takes a known time for each message."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from fakes.service import make_layer
from moe_runtime.config.gates import LinearGateConfig
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import MoERuntimeError, OverloadedError
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.retries import RetryPolicy
from moe_runtime.rpc.server import RpcServer
from moe_runtime.service.ports import HostReply, SegmentResult
from moe_runtime.service.router_service import RouterService
from moe_runtime.service.routing_table import Replica, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

BATCH_TOKENS = 100
BATCH_S = 0.1
#: Tokens per second in full batches, at best.
CAPACITY = BATCH_TOKENS / BATCH_S
#: Few requests with many tokens: the machine may be busy, and it is the queue that is measured.
ROWS = np.ones((25, 3), np.float32)
TIMEOUT_S = 1.0
LOAD_S = 6.0
NO_RETRIES = RetryPolicy(max_attempts=1)


@dataclass
class Host:
    """Where the router is, and how long each message really took: the machine may be busy."""

    address: str
    took_s: list[float] = field(default_factory=list)

    def capacity(self) -> float:
        """Tokens per second in full batches."""
        return BATCH_TOKENS / statistics.fmean(self.took_s)


@dataclass
class Seen:
    """What the callers saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)


@pytest.fixture
def host() -> Iterator[Host]:
    """A router whose one expert host takes ``BATCH_S`` for each message."""
    network, stopping = InProcessNetwork(), threading.Event()
    transport, took_s = network.host_transport(), []

    def serve() -> None:
        while not stopping.is_set():
            for delivery in transport.receive(0.1):
                began_at = time.monotonic()
                # How long this takes is what is given here, not what is waited for.
                stopping.wait(BATCH_S)
                request = delivery.request
                results = tuple(SegmentResult(s.replica_id, s.num_rows) for s in request.segments)
                transport.reply(delivery, HostReply(request.ticket, results, request.rows))
                took_s.append(time.monotonic() - began_at)

    gate = build_gate(LinearGateConfig(), GateShape(3, 1), seed=0).eval()
    layer = make_layer(1, gate=gate, gate_features=3, timeout_s=10.0)
    limits = LimitsConfig()
    service = RouterService(
        {"layer": layer}, network.router_transport(), router=RouterConfig(max_batch_tokens=BATCH_TOKENS), limits=limits
    )
    service.set_table(RoutingTable(1, {("layer", 0): (Replica("layer/0/0", transport.endpoint),)}))
    server = RpcServer(service, address="127.0.0.1:0", limits=limits, info={})
    thread = threading.Thread(target=serve)
    thread.start()
    service.start()
    yield Host(server.start(), took_s)
    server.stop(0.0)
    service.close()
    stopping.set()
    transport.wake()
    thread.join()
    transport.close()


async def call(client: AsyncMoEClient, seen: Seen) -> float:
    """Call once; how long to wait before the next call, as the router asked."""
    began_at = time.monotonic()
    try:
        await client.forward(ROWS, layer="layer", timeout_s=TIMEOUT_S)
    except MoERuntimeError as exc:
        seen.outcomes[type(exc).__name__] += 1
        return exc.retry_after_ms / 1000.0 if isinstance(exc, OverloadedError) else 0.0
    seen.outcomes["answered"] += 1
    seen.latencies.append(time.monotonic() - began_at)
    return 0.0


async def open_loop(client: AsyncMoEClient, *, times: float, for_s: float, seen: Seen) -> None:
    """Requests at so many times the capacity, whatever becomes of them."""
    gap_s = len(ROWS) / (CAPACITY * times)
    began_at = time.monotonic()
    async with asyncio.TaskGroup() as calls:
        for number in range(int(for_s / gap_s)):
            await asyncio.sleep(max(0.0, began_at + number * gap_s - time.monotonic()))
            calls.create_task(call(client, seen))


async def closed_loop(client: AsyncMoEClient, *, num_callers: int, for_s: float, seen: Seen) -> None:
    """Callers that ask again as soon as they are answered, or as they are told."""

    async def ask() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                while True:
                    pause_s = await call(client, seen)
                    await asyncio.sleep(pause_s)

    await asyncio.gather(*(ask() for _ in range(num_callers)))


def goodput(seen: Seen, host: Host) -> float:
    """Tokens per second that were answered in time, as a part of what the host could do."""
    return seen.outcomes["answered"] * len(ROWS) / LOAD_S / host.capacity()


async def check_recovery(client: AsyncMoEClient) -> None:
    """One second after the load, a lone request takes a lone request's time."""
    await asyncio.sleep(1.0)
    seen = Seen()
    for _ in range(3):
        await call(client, seen)
    assert seen.outcomes == {"answered": 3}
    assert max(seen.latencies) < 5 * BATCH_S
    queue = (await client.status())["queue"]
    assert (queue["tokens"], queue["bytes"], queue["requests"]) == (0, 0, 0)


@pytest.mark.soak
async def test_open_loop_of_three_times_the_capacity(host: Host, record_property) -> None:
    async with AsyncMoEClient(host.address, retry_policy=NO_RETRIES) as client:
        await open_loop(client, times=3.0, for_s=LOAD_S / 2, seen=Seen())
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host.took_s.clear()
        seen = Seen()
        await open_loop(client, times=3.0, for_s=LOAD_S, seen=seen)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        record_property("goodput", goodput(seen, host))
        record_property("outcomes", dict(seen.outcomes))
        assert goodput(seen, host) >= 0.8
        assert seen.outcomes["DeadlineExceededError"] <= 0.02 * seen.outcomes.total()
        assert grown_kib < 32 << 10
        await check_recovery(client)


@pytest.mark.soak
async def test_closed_loop_of_more_callers_than_the_queue_has_room_for(host: Host, record_property) -> None:
    async with AsyncMoEClient(host.address, retry_policy=NO_RETRIES) as client:
        await closed_loop(client, num_callers=96, for_s=LOAD_S / 2, seen=Seen())
        host.took_s.clear()
        seen = Seen()
        await closed_loop(client, num_callers=96, for_s=LOAD_S, seen=seen)
        record_property("goodput", goodput(seen, host))
        record_property("outcomes", dict(seen.outcomes))
        assert goodput(seen, host) >= 0.8
        await check_recovery(client)
