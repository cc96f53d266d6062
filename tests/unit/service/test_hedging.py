"""A second replica is asked when the first takes unusually long, and the first answer wins."""

from __future__ import annotations

import math

import pytest
import torch

from fakes.service import FakeClock, FakeTransport, endpoint, make_layer, replica, tokens_of
from moe_runtime.config.models import HedgeConfig
from moe_runtime.service.answer_times import AnswerTimes
from moe_runtime.service.batch import Batch, BatchResult
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.ports import HostLost, HostReply, SegmentResult
from moe_runtime.service.report import BatchLedger
from moe_runtime.service.routing_table import RoutingTable

#: One expert with two replicas, on hosts 10 and 11.
TWINS = RoutingTable(1, {("layer", 0): (replica(0, 10), replica(0, 11, n=1))})
# A power of two, so that clock times add up exactly.
USUAL_S = 1 / 64


class Router:
    """An engine with its fakes, whose expert usually answers in 16 ms."""

    def __init__(self, table: RoutingTable = TWINS, *, num_answers: int = 40, **changes: object) -> None:
        self.clock = FakeClock()
        self.transport = FakeTransport()
        fields = {"hedge": HedgeConfig(quantile=0.99, times=2.0, max_share=0.05), **changes}
        self.layer = make_layer(1, **fields)
        self.engine = RouterEngine({"layer": self.layer}, self.transport, node="here", clock=self.clock)
        self.engine.set_table(table)
        for _ in range(num_answers):
            self.submit()
            self.clock.advance(USUAL_S)
            self.answer(0)
        self.transport.polled_for.clear()

    def submit(self, tokens: torch.Tensor | None = None) -> None:
        tokens = tokens_of(2) if tokens is None else tokens
        self.engine.submit(Batch("layer", tokens, gate_input=torch.zeros(tokens.shape[0], 1)))

    def answer(self, place: int, times: float = 2.0) -> list[BatchResult]:
        self.transport.answer(self.transport.sent.pop(place)[1], times=times)
        return self.engine.poll(0.0)

    def wait(self, seconds: float) -> list[BatchResult]:
        self.clock.advance(seconds)
        return self.engine.poll(1.0)

    @property
    def hosts(self) -> list[int]:
        return [where.incarnation for where, _ in self.transport.sent]


def report_on(router: Router, result: BatchResult) -> tuple[int, int, int]:
    report = BatchLedger(result, router.layer).part(first_row=0, last_row=2, queue_s=0.0, return_routing=False)
    return report.num_served, report.num_hedged, report.num_retried


def test_the_first_answer_wins_and_the_other_is_ignored() -> None:
    router = Router()
    router.submit()
    assert router.engine.poll(1.0) == []
    assert router.transport.polled_for == [2 * USUAL_S]
    assert router.wait(2 * USUAL_S) == []
    assert router.hosts == [10, 11]
    assert torch.equal(router.transport.sent[0][1].rows, router.transport.sent[1][1].rows)
    (result,) = router.answer(1, times=3.0)
    assert torch.equal(result.outputs, 3 * tokens_of(2))
    assert report_on(router, result) == (2, 2, 0)
    assert router.answer(0) == []
    stats = router.engine.stats
    assert (stats.num_hedges, stats.num_late_replies, stats.layers["layer"].experts[0].num_hedged) == (1, 0, 2)
    assert stats.layers["layer"].experts[0].num_failed_attempts == 0


def test_the_first_may_still_win() -> None:
    router = Router()
    router.submit()
    router.wait(2 * USUAL_S)
    (result,) = router.answer(0, times=3.0)
    assert torch.equal(result.outputs, 3 * tokens_of(2))
    assert router.answer(0) == []


@pytest.mark.parametrize("first", [10, 11])
def test_one_that_fails_leaves_the_rows_to_the_other(first: int) -> None:
    router = Router()
    router.submit()
    router.wait(2 * USUAL_S)
    router.transport.arrivals.append(HostLost(endpoint(first), "gone", is_death=False))
    assert router.engine.poll(0.0) == []
    assert router.hosts == [10, 11]
    (result,) = router.answer(0 if first == 11 else 1)
    assert report_on(router, result) == (2, 2, 0)


def test_rows_that_both_fail_go_on_by_the_order() -> None:
    replicas = (*TWINS.replicas["layer", 0], replica(0, 12, n=2))
    router = Router(RoutingTable(1, {("layer", 0): replicas}))
    router.submit()
    router.wait(2 * USUAL_S)
    for host in router.hosts:
        router.transport.arrivals.append(HostLost(endpoint(host), "gone", is_death=False))
    assert router.engine.poll(0.0) == []
    assert len(set(router.hosts)) == 3
    (result,) = router.answer(2)
    assert report_on(router, result) == (2, 2, 2)


def test_rows_that_the_winner_fails_alone_go_on_though_the_other_is_still_at_work() -> None:
    router = Router()
    router.submit()
    router.wait(2 * USUAL_S)
    request = router.transport.sent[0][1]
    part = SegmentResult("layer/0/0", 2, error="not finite", failed_rows=(0,))
    router.transport.arrivals.append(HostReply(request.ticket, (part,), request.rows))
    (result,) = router.engine.poll(0.0)
    assert result.served.tolist() == [False, True]
    assert router.answer(1) == []


def test_a_share_of_the_messages_is_hedged_and_no_more() -> None:
    router = Router(num_answers=58)
    for _ in range(5):
        router.submit()
    router.wait(2 * USUAL_S)
    assert len(router.hosts) == 5 + 3
    assert router.engine.stats.num_hedges == math.floor(0.05 * 63)


@pytest.mark.parametrize(
    "router",
    [
        lambda: Router(num_answers=19),
        lambda: Router(hedge=None),
        lambda: Router(exact=True),
        lambda: Router(RoutingTable(1, {("layer", 0): (replica(0, 10),)})),
    ],
    ids=["too few answers", "no hedge", "exact", "no twin"],
)
def test_nothing_is_hedged_without_need_or_means(router) -> None:
    router = router()
    router.submit()
    router.wait(0.5)
    assert router.hosts == [10]


def test_the_usual_time_is_a_quantile_of_the_latest() -> None:
    times = AnswerTimes(0.5)
    for _ in range(19):
        times.add(1.0)
    assert times.usual_s is None
    times.add(1.0)
    assert times.usual_s == 1.0
    for _ in range(128):
        times.add(3.0)
    assert times.usual_s == 3.0
