"""A replica that did not answer is left alone, longer each time, until it answers."""

from __future__ import annotations

import pytest
import torch

from fakes.service import FakeClock, FakeTransport, endpoint, logits_for, make_layer, replica, table_of, tokens_of
from moe_runtime.config.models import OnFailureConfig
from moe_runtime.service.batch import Batch
from moe_runtime.service.breakers import FIRST_BACKOFF_S, LATE_BACKOFF_S, LONGEST_BACKOFF_S, Breakers
from moe_runtime.service.dispatch import PlannedSegment, make_message
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.ports import HostLost
from moe_runtime.service.replica_choice import ReplicaChoice
from moe_runtime.service.routing_table import ReplicaState, RoutingTable

#: One expert with two replicas, on hosts 10 and 11.
TWINS = RoutingTable(1, {("layer", 0): (replica(0, 10), replica(0, 11, n=1))})


def test_an_open_breaker_lets_one_probe_through_when_its_time_has_come() -> None:
    clock = FakeClock()
    breakers = Breakers(clock)
    assert breakers.lets_through("a")
    breakers.failed("a", sent_at=clock.now())
    assert breakers.any_open
    assert not breakers.lets_through("a")
    assert breakers.lets_through("b")
    clock.advance(FIRST_BACKOFF_S)
    assert breakers.lets_through("a")
    breakers.probe("a")
    assert not breakers.lets_through("a")
    breakers.answered("a")
    assert breakers.lets_through("a")
    assert not breakers.any_open


def test_the_backoff_doubles_with_every_probe_that_fails_and_has_an_end() -> None:
    clock = FakeClock()
    breakers = Breakers(clock)
    breakers.failed("a", sent_at=clock.now())
    for backoff_s in (0.5, 1.0, 2.0, 4.0, 8.0, 8.0):
        clock.advance(backoff_s - 0.001)
        assert not breakers.lets_through("a")
        clock.advance(0.001)
        assert breakers.lets_through("a")
        breakers.probe("a")
        breakers.failed("a", sent_at=clock.now())
    assert LONGEST_BACKOFF_S == 8.0


def test_messages_that_were_sent_before_it_opened_do_not_lengthen_the_backoff() -> None:
    clock = FakeClock()
    breakers = Breakers(clock)
    sent_at = clock.now()
    clock.advance(1.0)
    for _ in range(5):
        breakers.failed("a", sent_at=sent_at)
    clock.advance(FIRST_BACKOFF_S)
    assert breakers.lets_through("a")


def test_a_probe_that_came_to_nothing_leaves_room_for_another() -> None:
    clock = FakeClock()
    breakers = Breakers(clock)
    breakers.failed("a", sent_at=clock.now())
    clock.advance(FIRST_BACKOFF_S)
    breakers.probe("a")
    breakers.probe_ended("a")
    assert breakers.lets_through("a")


def test_the_breakers_of_what_is_gone_are_forgotten() -> None:
    clock = FakeClock()
    choice = ReplicaChoice(node="here", clock=clock)
    segment = PlannedSegment(0, range(1), "layer/0/0")
    for host in (10, 11):
        choice.timed_out(make_message(endpoint(host), [segment]), sent_at=clock.now())
        choice.host_lost(endpoint(host))
    choice.retain({endpoint(11)})
    assert choice.choose((replica(0, 10),)) is not None
    assert choice.choose((replica(0, 11),)) is None
    assert choice.choose((replica(0, 11),), at_any_rate=True) is not None


def test_ready_replicas_come_before_suspect_ones() -> None:
    choice = ReplicaChoice(node="here", clock=FakeClock())
    suspect, ready = replica(0, 10, state=ReplicaState.SUSPECT), replica(0, 11, n=1)
    choice.sent(make_message(endpoint(11), [PlannedSegment(0, range(100), ready.replica_id)]))
    assert choice.choose((suspect, ready)) is ready
    assert choice.choose((suspect, ready), tried=(ready.replica_id,)) is suspect


class Router:
    """An engine with its fakes, and a layer of one expert."""

    def __init__(self, table: RoutingTable, num_experts: int = 1, **changes: object) -> None:
        self.clock = FakeClock()
        self.transport = FakeTransport()
        layer = make_layer(num_experts, **changes)
        self.engine = RouterEngine({"layer": layer}, self.transport, node="here", clock=self.clock)
        self.engine.set_table(table)

    def submit(self, logits: torch.Tensor | None = None) -> list[int]:
        """The hosts that get the rows of a batch."""
        before = len(self.transport.sent)
        logits = torch.zeros(1, 1) if logits is None else logits
        self.engine.submit(Batch("layer", tokens_of(1), gate_input=logits))
        return [where.incarnation for where, _ in self.transport.sent[before:]]


def test_after_a_time_out_the_replica_gets_nothing_then_a_probe_then_its_share() -> None:
    router = Router(TWINS)
    assert router.submit() == [10]
    router.clock.advance(1.0)
    router.engine.poll(0.0)
    assert router.transport.sent[-1][0] == endpoint(11)
    assert [router.submit() for _ in range(3)] == [[11]] * 3
    router.clock.advance(LATE_BACKOFF_S)
    assert router.submit() == [10]
    assert router.submit() == [11]
    router.transport.answer(router.transport.sent[-2][1])
    router.engine.poll(0.0)
    assert router.submit() == [10]


def test_a_late_answer_closes_the_breaker() -> None:
    router = Router(TWINS)
    router.submit()
    late = router.transport.sent[0][1]
    router.clock.advance(1.0)
    router.engine.poll(0.0)
    assert router.submit() == [11]
    router.transport.answer(late)
    router.engine.poll(0.0)
    assert router.submit() == [10]


@pytest.mark.parametrize("is_death", [True, False])
def test_a_host_that_was_lost_gets_nothing_until_its_time_comes(is_death: bool) -> None:
    router = Router(TWINS)
    router.transport.arrivals.append(HostLost(endpoint(10), "gone", is_death=is_death))
    router.engine.poll(0.0)
    assert router.submit() == [11]
    router.clock.advance(FIRST_BACKOFF_S)
    assert router.submit() == [10]


def test_a_replica_that_does_not_answer_is_asked_where_there_is_nobody_else() -> None:
    router = Router(table_of(1, 10), on_failure=OnFailureConfig(order=("drop",)))
    router.submit()
    router.clock.advance(2.0)
    assert len(router.engine.poll(0.0)) == 1
    assert router.submit() == [10]


def test_a_replica_that_does_not_answer_is_not_asked_where_tokens_can_go_elsewhere() -> None:
    router = Router(table_of(1, 10, 11), num_experts=2)
    assert router.submit(logits_for(0)) == [10]
    router.clock.advance(1.0)
    router.engine.poll(0.0)
    assert router.submit(logits_for(0)) == [11]
