"""Clients take turns; within a client, first come is first served."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fakes.service import tokens_of
from moe_runtime.service.fair_queue import FairQueue, QueuedRequest
from moe_runtime.service.requests import LayerRequest


def queued(key: int, num_tokens: int, client: str = "") -> QueuedRequest:
    return QueuedRequest(key, LayerRequest(str(key), "layer", tokens_of(num_tokens), client=client), arrived_at=key)


def fill(queue: FairQueue, space: int) -> list[tuple[int, int]]:
    """The (request, rows) that a batch of so many rows takes."""
    taken = []
    while queue and space:
        request = queue.next(space)
        num_rows = min(request.num_rows_left, space)
        queue.sent(request, num_rows)
        taken.append((request.request_key, num_rows))
        space -= num_rows
    return taken


def test_lone_client_is_served_in_the_order_of_its_requests() -> None:
    queue = FairQueue(2)
    for key, num_tokens in enumerate((3, 5, 1), start=1):
        queue.add(queued(key, num_tokens))
    assert fill(queue, 6) == [(1, 3), (2, 3)]
    assert (len(queue), queue.num_tokens) == (2, 3)
    assert fill(queue, 6) == [(2, 2), (3, 1)]


def test_client_with_one_request_does_not_wait_for_the_many_of_another() -> None:
    queue = FairQueue(2)
    for key in range(1, 11):
        queue.add(queued(key, 2, "flood"))
    queue.add(queued(11, 2, "small"))
    assert (11, 2) in fill(queue, 6)


def test_clients_that_always_ask_get_equal_numbers_of_rows_whatever_the_size_of_their_requests() -> None:
    queue = FairQueue(4)
    for key in range(100):
        queue.add(queued(key, 1, "small"))
        queue.add(queued(1000 + key, 16, "large"))
    rows: Counter[str] = Counter()
    for _ in range(10):
        for key, num_rows in fill(queue, 16):
            rows["large" if key >= 1000 else "small"] += num_rows
    assert abs(rows["small"] - rows["large"]) <= 20
    assert rows.total() == 160


def test_request_that_is_removed_frees_its_rows_that_are_left() -> None:
    queue = FairQueue(2)
    queue.add(queued(1, 5))
    queue.add(queued(2, 1, "b"))
    assert queue.oldest.request_key == 1
    removed = queue.remove(1)
    assert removed is not None
    assert removed.num_rows_left == 5
    assert queue.remove(1) is None
    assert (len(queue), queue.num_tokens, queue.oldest.request_key) == (1, 1, 2)


@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.sampled_from("abc")), min_size=1, max_size=20),
    removed=st.sets(st.integers(0, 19), max_size=3),
    turn=st.integers(1, 8),
)
def test_every_row_leaves_once_and_a_clients_requests_in_their_order(
    requests: list[tuple[int, str]], removed: set[int], turn: int
) -> None:
    queue = FairQueue(turn)
    for key, (num_tokens, client) in enumerate(requests):
        queue.add(queued(key, num_tokens, client))
    left = {key: n for key, (n, _) in enumerate(requests)}
    for key in removed & left.keys():
        queue.remove(key)
        del left[key]
    rows: Counter[int] = Counter()
    finished: dict[str, list[int]] = {client: [] for client in "abc"}
    while queue:
        for key, num_rows in fill(queue, 6):
            rows[key] += num_rows
            if rows[key] == left[key]:
                finished[requests[key][1]].append(key)
    assert rows == left
    assert all(keys == sorted(keys) for keys in finished.values())
    assert queue.num_tokens == 0
