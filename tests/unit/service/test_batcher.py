"""When a batch falls due, what it holds, and what the queue refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes.service import FakeClock, make_layer, tokens_of
from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.runtime import RouterConfig
from moe_runtime.service.batcher import Batcher, JoinedBatch
from moe_runtime.service.budget import Place, QueueBudget
from moe_runtime.service.fair_queue import QueuedRequest
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.queue_stats import QueueStats
from moe_runtime.service.requests import LayerRequest
from moe_runtime.wire.messages import RequestOptions


class Queue:
    """A batcher with its fakes."""

    def __init__(self, *layers: RoutedLayer, max_batch_tokens: int = 8) -> None:
        self.clock = FakeClock()
        self.router = RouterConfig(
            max_batch_tokens=max_batch_tokens, max_wait_ms=10.0, max_queued_tokens=100, max_queued_bytes=100 * 12
        )
        self.stats = QueueStats()
        self.budget = QueueBudget(self.router, clock=self.clock, stats=self.stats)
        by_name = {layer.name: layer for layer in layers or (make_layer(),)}
        self.batcher = Batcher(by_name, router=self.router, budget=self.budget, stats=self.stats, clock=self.clock)
        self.keys = itertools.count(1)

    def add(
        self,
        num_tokens: int,
        *,
        layer: str = "layer",
        tokens: torch.Tensor | None = None,
        client: str = "",
        deadline: float | None = None,
        **options,
    ) -> int:
        key = next(self.keys)
        rows = tokens_of(num_tokens) + 100 * key if tokens is None else tokens
        request = LayerRequest(
            f"request-{key}", layer, rows, RequestOptions(**options), deadline=deadline, client=client
        )
        self.budget.reserve(Place(layer, client, num_tokens, rows.nbytes), time_left_s=60.0)
        self.batcher.add(QueuedRequest(key, request, self.clock.now()))
        return key

    def sizes(self) -> list[int]:
        joined = iter(self.batcher.next_batch, None)
        return [batch.batch.tokens.shape[0] for batch in joined]

    def next(self) -> JoinedBatch:
        joined = self.batcher.next_batch()
        assert joined is not None
        return joined


def test_an_idle_layer_dispatches_at_once() -> None:
    queue = Queue()
    queue.add(1)
    assert queue.sizes() == [1]


def test_a_busy_layer_waits_for_batch_mates_until_the_oldest_has_waited_long_enough() -> None:
    queue = Queue()
    queue.add(1)
    queue.next()
    queue.add(2)
    queue.clock.advance(0.004)
    queue.add(3)
    assert queue.batcher.next_batch() is None
    assert queue.batcher.seconds_to_next() == pytest.approx(0.006)
    queue.clock.advance(0.006)
    assert queue.sizes() == [5]
    assert queue.batcher.seconds_to_next() is None


def test_a_full_batch_does_not_wait() -> None:
    queue = Queue()
    queue.add(1)
    queue.next()
    queue.add(5)
    queue.add(5)
    joined = queue.next()
    assert joined.batch.tokens.shape[0] == 8
    assert [(part.request_key, part.start, part.stop, part.offset) for part in joined.parts] == [
        (2, 0, 5, 0),
        (3, 0, 3, 5),
    ]
    queue.batcher.batch_done("layer")
    assert [(part.request_key, part.start, part.stop) for part in queue.next().parts] == [(3, 3, 5)]


def test_no_batch_leaves_while_every_slot_is_taken_and_the_freed_slot_takes_what_waits() -> None:
    queue = Queue(make_layer(max_batches_in_flight=2))
    queue.add(8)
    queue.add(8)
    queue.add(8)
    queue.add(1)
    assert queue.sizes() == [8, 8]
    queue.clock.advance(60.0)
    assert queue.batcher.next_batch() is None
    assert queue.batcher.seconds_to_next() is None
    queue.batcher.batch_done("layer")
    assert queue.sizes() == [8]
    queue.batcher.batch_done("layer")
    assert queue.sizes() == [1]


def test_a_slot_freed_in_a_half_idle_layer_is_no_reason_to_hurry() -> None:
    queue = Queue(make_layer(max_batches_in_flight=3))
    queue.add(8)
    queue.add(8)
    assert queue.sizes() == [8, 8]
    queue.add(1)
    queue.batcher.batch_done("layer")
    assert queue.batcher.next_batch() is None


def test_callers_that_were_answered_together_travel_together_again() -> None:
    queue = Queue()
    for _ in range(3):
        queue.add(1)
    joined = queue.next()
    queue.clock.advance(0.1)
    queue.batcher.batch_answered(joined)
    queue.add(1)
    queue.clock.advance(0.02)
    queue.add(1)
    assert queue.batcher.next_batch() is None
    # Half of the 100 ms that their batch took, from the second's arrival on.
    assert queue.batcher.seconds_to_next() == pytest.approx(0.05)
    queue.add(1)
    assert queue.sizes() == [3]


def test_a_caller_that_does_not_come_back_holds_up_the_others_for_half_a_batch_at_most() -> None:
    queue = Queue()
    for _ in range(3):
        queue.add(1)
    joined = queue.next()
    queue.clock.advance(0.1)
    queue.batcher.batch_answered(joined)
    queue.add(1)
    queue.add(1)
    assert queue.batcher.next_batch() is None
    queue.clock.advance(0.051)
    assert queue.sizes() == [2]


def test_a_lone_caller_never_waits() -> None:
    queue = Queue()
    for _ in range(3):
        queue.add(1)
        joined = queue.next()
        queue.clock.advance(0.1)
        queue.batcher.batch_answered(joined)


def test_nobody_waits_for_the_callers_of_a_batch_that_was_lost() -> None:
    queue = Queue()
    queue.add(1)
    queue.add(1)
    queue.next()
    queue.clock.advance(0.1)
    queue.batcher.batch_done("layer")
    queue.add(1)
    assert queue.sizes() == [1]


def test_a_full_batch_and_an_isolated_request_wait_for_no_returning_callers() -> None:
    for first in ({"num_tokens": 8}, {"num_tokens": 1, "isolated": True}):
        queue = Queue()
        for _ in range(3):
            queue.add(1)
        joined = queue.next()
        queue.clock.advance(0.1)
        queue.batcher.batch_answered(joined)
        queue.add(**first)
        assert queue.sizes() == [first["num_tokens"]]


def test_a_split_request_is_one_caller() -> None:
    queue = Queue()
    queue.add(12)
    for _ in range(2):
        joined = queue.next()
        queue.clock.advance(0.1)
        queue.batcher.batch_answered(joined)
    queue.add(1)
    assert queue.sizes() == [1]


def test_layers_do_not_wait_for_each_other() -> None:
    queue = Queue(make_layer(), make_layer(name="other"))
    queue.add(1)
    queue.add(2, layer="other")
    assert queue.sizes() == [1, 2]


def test_requests_share_a_batch_of_a_policy_that_couples_tokens_but_none_is_torn_apart() -> None:
    policy = replace(make_layer().policy, batch_coupled=True)
    layer = make_layer(policy=policy, allow_batch_coupled=True, max_batches_in_flight=9)
    queue = Queue(layer)
    for num_tokens in (5, 5, 3, 8, 1):
        queue.add(num_tokens)
    queue.clock.advance(1.0)
    joined = [[(part.start, part.stop) for part in batch.parts] for batch in iter(queue.batcher.next_batch, None)]
    assert joined == [[(0, 5)], [(0, 5), (0, 3)], [(0, 8)], [(0, 1)]]


def test_an_isolated_request_is_a_batch_of_its_own() -> None:
    queue = Queue(make_layer(max_batches_in_flight=9))
    for isolated in (False, True, False, False):
        queue.add(1, isolated=isolated)
    queue.clock.advance(1.0)
    assert queue.sizes() == [1, 1, 2]


def test_a_request_larger_than_a_batch_is_split_into_consecutive_batches() -> None:
    queue = Queue(make_layer(max_batches_in_flight=9))
    queue.add(20)
    queue.clock.advance(1.0)
    batches = [queue.next() for _ in range(3)]
    assert torch.equal(torch.cat([batch.batch.tokens for batch in batches]), tokens_of(20) + 100)
    assert [batch.parts[0].stop for batch in batches] == [8, 16, 20]


def test_the_budget_is_given_back_as_rows_leave() -> None:
    queue = Queue()
    key = queue.add(20)
    assert (queue.budget.num_tokens, queue.budget.num_bytes) == (20, 240)
    queue.next()
    assert (queue.budget.num_tokens, queue.budget.num_bytes) == (12, 144)
    queue.batcher.remove(key, "layer")
    assert (queue.budget.num_tokens, queue.budget.num_bytes) == (0, 0)
    assert queue.batcher.depth("layer") == {"queued_requests": 0, "queued_tokens": 0, "batches_in_flight": 1}
    queue.batcher.remove(key, "layer")
    assert queue.budget.num_tokens == 0


def test_options_are_joined_row_by_row_with_defaults_for_those_who_gave_none() -> None:
    queue = Queue(make_layer(num_experts=3, k=2, gate_features=3))
    queue.add(1)
    queue.next()
    queue.add(2)
    queue.add(1, k=1, mask=torch.tensor([False]), gate_input=torch.tensor([[7.0, 8.0, 9.0]]))
    queue.add(2, k=torch.tensor([2, 1], dtype=torch.int32))
    queue.clock.advance(1.0)
    batch = queue.next().batch
    assert isinstance(batch.info.k, torch.Tensor)
    assert batch.info.k.tolist() == [2, 2, 1, 2, 1]
    assert batch.info.mask is not None
    assert batch.info.mask.tolist() == [True, True, False, True, True]
    assert batch.gate_input is not None
    assert batch.gate_input[2].tolist() == [7.0, 8.0, 9.0]
    assert torch.equal(batch.gate_input[:2], batch.tokens[:2])
    assert batch.info.row_seeds is None


def test_a_batch_without_options_carries_none() -> None:
    queue = Queue()
    queue.add(2)
    batch = queue.next().batch
    assert (batch.gate_input, batch.info.k, batch.info.mask, batch.info.row_seeds) == (None, None, None, None)


def test_row_seeds_depend_on_the_request_alone() -> None:
    layer = make_layer(capacity=CapacityConfig(factor=1.0, drop="random"), max_batches_in_flight=9)
    queue = Queue(layer)
    queue.add(4, seed=5)
    queue.add(3)
    queue.add(12, seed=5)
    queue.clock.advance(1.0)
    first, second, third = (queue.next().batch.info.row_seeds for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    seeds = torch.cat([first, second, third]).tolist()
    assert seeds[:4] == seeds[7:11]
    assert len(set(seeds[4:])) == len(seeds[4:])


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    isolated=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_every_row_leaves_exactly_once_and_in_order(sizes: list[int], isolated: list[bool]) -> None:
    queue = Queue(make_layer(max_batches_in_flight=1), max_batch_tokens=6)
    for size, alone in zip(sizes, isolated, strict=False):
        if sum(sizes[:8]) <= 100 and not (alone and size > 6):
            queue.add(size, isolated=alone)
    seen: dict[int, list[int]] = {}
    while (joined := queue.batcher.next_batch()) is not None:
        offset = 0
        for part in joined.parts:
            assert part.offset == offset
            offset += part.stop - part.start
            seen.setdefault(part.request_key, []).extend(range(part.start, part.stop))
        assert offset == joined.batch.tokens.shape[0] <= 6
        queue.batcher.batch_done("layer")
    assert all(rows == list(range(len(rows))) for rows in seen.values())
    assert queue.budget.num_tokens == 0


@pytest.mark.parametrize(
    ("deadlines", "awaited_until"), [([7.0], 7.0), ([5.0, 9.0, 8.0], 9.0), ([5.0, None], float("inf"))]
)
def test_a_batch_is_awaited_until_the_last_deadline_of_its_requests(
    deadlines: list[float | None], awaited_until: float
) -> None:
    queue = Queue(make_layer())
    queue.add(1)
    queue.next()
    for deadline in deadlines:
        queue.add(1, deadline=deadline)
    queue.batcher.batch_done("layer")
    assert queue.next().batch.awaited_until == awaited_until
