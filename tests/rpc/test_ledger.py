"""Nothing lost: each of many concurrent requests has exactly one outcome, and the router's counters agree."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np

from fakes.live_router import WIDTH, LiveRouter, StartRouter
from moe_runtime.config.runtime import RouterConfig
from moe_runtime.errors import DeadlineExceededError, NonFiniteError, ShapeError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.wire.messages import ForwardResult

NUM_REQUESTS = 300
GOOD, WRONG_SHAPE, NON_FINITE, LATE, CANCELLED = "good", "wrong shape", "non-finite", "late", "cancelled"


class Ledger:
    """The outcome of each request, by its number; a second outcome is an error."""

    def __init__(self) -> None:
        self.outcomes: dict[int, str] = {}
        self.reports: Counter[str] = Counter()
        self.request_ids: set[str] = set()

    def enter(self, number: int, outcome: str) -> None:
        assert number not in self.outcomes
        self.outcomes[number] = outcome

    def enter_result(self, number: int, rows: np.ndarray, result: ForwardResult) -> None:
        report = result.report
        self.enter(number, GOOD)
        np.testing.assert_allclose(result.outputs, rows, rtol=1e-6)
        assert report.num_tokens == len(rows)
        assert report.num_assignments == 2 * len(rows)
        assert report.request_id not in self.request_ids
        self.request_ids.add(report.request_id)
        self.reports.update(tokens=report.num_tokens, served=report.num_served)


async def make_request(client: AsyncMoEClient, ledger: Ledger, number: int, kind: str) -> None:
    rng = np.random.default_rng(number)
    rows = rng.uniform(1, 2, (int(rng.integers(1, 40)), WIDTH)).astype(np.float32)
    if kind == NON_FINITE:
        rows[-1, 0] = np.nan
    inputs = rows[:, 1:] if kind == WRONG_SHAPE else rows
    layer, timeout_s = ("stuck", 0.2) if kind == LATE else ("vectors", 20.0)
    try:
        result = await client.forward(inputs, layer="stuck" if kind == CANCELLED else layer, timeout_s=timeout_s)
    except ShapeError:
        ledger.enter(number, WRONG_SHAPE)
    except NonFiniteError:
        ledger.enter(number, NON_FINITE)
    except DeadlineExceededError:
        ledger.enter(number, LATE)
    except asyncio.CancelledError:
        ledger.enter(number, CANCELLED)
    else:
        ledger.enter_result(number, rows, result)


async def run_mixed_load(live: LiveRouter, kinds: list[str]) -> Ledger:
    ledger = Ledger()
    async with AsyncMoEClient(live.address) as client:
        calls = [asyncio.create_task(make_request(client, ledger, number, kind)) for number, kind in enumerate(kinds)]
        await asyncio.gather(*(call for call, kind in zip(calls, kinds, strict=True) if kind == GOOD))
        for call, kind in zip(calls, kinds, strict=True):
            if kind == CANCELLED:
                call.cancel()
        await asyncio.gather(*calls)
    return ledger


async def test_every_request_has_exactly_one_outcome(start_router: StartRouter) -> None:
    live = start_router(router=RouterConfig(max_batch_tokens=64))
    kinds = random.Random(1).choices([GOOD, WRONG_SHAPE, NON_FINITE, LATE, CANCELLED], [12, 1, 1, 1, 1], k=NUM_REQUESTS)
    ledger = await run_mixed_load(live, kinds)
    assert ledger.outcomes == dict(enumerate(kinds))
    live.wait_for(lambda status: status["open_requests"] == 0)
    status = live.service.status()
    layer = status["layers"]["vectors"]
    assert status["num_answered"] == kinds.count(GOOD)
    assert status["num_requests"] == status["num_answered"] + status["num_failed"]
    assert layer["num_tokens"] == ledger.reports["tokens"]
    assert sum(expert["num_served"] for expert in layer["experts"]) == ledger.reports["served"]
    assert (layer["queued_requests"], layer["batches_in_flight"]) == (0, 0)
