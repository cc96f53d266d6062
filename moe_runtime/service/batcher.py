"""Joins requests of one layer into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.service.budget import Place
from moe_runtime.service.fair_queue import FairQueue, turn_tokens
from moe_runtime.service.joining import BatchPart, build_batch
from moe_runtime.service.returning import ReturningCallers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.runtime import RouterConfig
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.budget import QueueBudget
    from moe_runtime.service.fair_queue import QueuedRequest
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.queue_stats import QueueStats


@dataclass(frozen=True)
class JoinedBatch:
    """A batch, whose rows it holds, when it left the queue by the clock, and whether other rows stayed behind."""

    batch: Batch
    parts: tuple[BatchPart, ...]
    joined_at: float
    left_rows_waiting: bool

    @property
    def num_last_parts(self) -> int:
        """Requests of which nothing is left to come."""
        return sum(part.is_last for part in self.parts)


@dataclass
class _LayerQueue:
    layer: RoutedLayer
    callers: ReturningCallers
    waiting: FairQueue
    num_in_flight: int = 0
    slot_was_freed: bool = False


class Batcher:
    """Queues requests per layer and says which batch goes next. Owned by one thread.

    A request is dispatched at once when its layer has nothing in flight. Otherwise it waits for batch-mates
    until ``max_batch_tokens`` have come together, until ``max_wait_ms`` have passed since the oldest came, or
    until a batch returns to a layer all of whose slots were taken; and in any case for a free slot
    (``max_batches_in_flight``). Idle or not, it waits for callers that were answered just now
    (``ReturningCallers``). A request with more rows than a batch may hold is split. Clients take turns
    (``FairQueue``).

    Args:
        layers: The layers, by name.
        router: Holds the limits of a batch.
        budget: Gets back the place of whatever leaves the queue, and learns how fast that goes.
        stats: Counts how long requests wait.
        clock: Tells the time.
    """

    def __init__(
        self,
        layers: Mapping[str, RoutedLayer],
        *,
        router: RouterConfig,
        budget: QueueBudget,
        stats: QueueStats,
        clock: Clock,
    ) -> None:
        self._max_batch_tokens = router.max_batch_tokens
        self._max_wait_s = router.max_wait_ms / 1000.0
        turn = turn_tokens(router.max_batch_tokens)
        self._queues = {
            name: _LayerQueue(layer, ReturningCallers(self._max_wait_s), FairQueue(turn))
            for name, layer in layers.items()
        }
        self._budget = budget
        self._stats = stats
        self._clock = clock

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and no batch is under way."""
        return not any(queue.waiting or queue.num_in_flight for queue in self._queues.values())

    def add(self, queued: QueuedRequest) -> None:
        """Put a request, whose place in the budget is reserved, at the end of its client's line for the layer."""
        queue = self._queues[queued.request.layer]
        queue.waiting.add(queued)
        queue.callers.arrived(self._clock.now())

    def remove(self, request_key: int, layer: str) -> int:
        """Take whatever rows of a request still wait out of the queue; how many those are."""
        queued = self._queues[layer].waiting.remove(request_key)
        if queued is None:
            return 0
        self._budget.release(_place_of(queued, queued.num_rows_left))
        return queued.num_rows_left

    def next_batch(self) -> JoinedBatch | None:
        """A batch that is due, or None; the caller must say when it is done, or answered."""
        now = self._clock.now()
        for queue in self._queues.values():
            due_at = self._due_at(queue, now)
            if due_at is not None and due_at <= now:
                queue.num_in_flight += 1
                queue.slot_was_freed = False
                return self._join(queue, now)
        return None

    def batch_done(self, layer: str) -> None:
        """Free the slot of a batch that is no longer under way."""
        queue = self._queues[layer]
        queue.slot_was_freed = queue.num_in_flight == queue.layer.max_batches_in_flight
        queue.num_in_flight -= 1

    def batch_answered(self, joined: JoinedBatch) -> None:
        """Free the slot of a batch that has returned, and expect those back whose requests it answers."""
        self.batch_done(joined.batch.layer)
        now, layer = self._clock.now(), joined.batch.layer
        self._budget.pace(layer).batch_answered(
            int(joined.batch.tokens.shape[0]),
            joined_at=joined.joined_at,
            now=now,
            left_rows_waiting=joined.left_rows_waiting,
        )
        callers = self._queues[layer].callers
        callers.answered(joined.num_last_parts, took_s=now - joined.joined_at, now=now)

    def seconds_to_next(self) -> float | None:
        """How long until a batch falls due if nothing else happens; None if none will."""
        now = self._clock.now()
        due_ats = [self._due_at(queue, now) for queue in self._queues.values()]
        return min((max(0.0, due_at - now) for due_at in due_ats if due_at is not None), default=None)

    def depth(self, layer: str) -> dict[str, int]:
        """Requests and tokens that wait, and batches in flight."""
        queue = self._queues[layer]
        return {
            "queued_requests": len(queue.waiting),
            "queued_tokens": queue.waiting.num_tokens,
            "batches_in_flight": queue.num_in_flight,
        }

    def _due_at(self, queue: _LayerQueue, now: float) -> float | None:
        """Clock time when the next batch of a layer falls due if nothing else happens; None if none will."""
        if not queue.waiting or queue.num_in_flight >= queue.layer.max_batches_in_flight:
            return None
        if queue.waiting.num_tokens >= self._max_batch_tokens:
            return now
        oldest = queue.waiting.oldest
        all_back_at = queue.callers.wait_until(oldest.arrived_at, now)
        if all_back_at is not None and not self._travels_alone(oldest, queue):
            return all_back_at
        if queue.num_in_flight == 0 or queue.slot_was_freed:
            return now
        return oldest.arrived_at + self._max_wait_s

    def _join(self, queue: _LayerQueue, now: float) -> JoinedBatch:
        taken: list[tuple[QueuedRequest, BatchPart]] = []
        num_tokens = 0
        while queue.waiting and num_tokens < self._max_batch_tokens:
            queued = queue.waiting.next(self._max_batch_tokens - num_tokens)
            alone = self._travels_alone(queued, queue)
            fits = queue.layer.splits_requests or queued.num_rows_left <= self._max_batch_tokens - num_tokens
            if taken and (alone or not fits):
                break
            part = self._take(queued, queue, offset=num_tokens)
            taken.append((queued, part))
            num_tokens += part.stop - part.start
            if part.is_last:
                self._stats.waited(queue.layer.name, now - queued.arrived_at)
            if alone:
                break
        parts = tuple(part for _, part in taken)
        batch = build_batch([(q.request, p) for q, p in taken], queue.layer)
        return JoinedBatch(batch, parts, joined_at=now, left_rows_waiting=bool(queue.waiting))

    def _travels_alone(self, queued: QueuedRequest, queue: _LayerQueue) -> bool:
        return queued.request.options.isolated or queue.layer.isolates_requests

    def _take(self, queued: QueuedRequest, queue: _LayerQueue, *, offset: int) -> BatchPart:
        num_rows = min(queued.num_rows_left, self._max_batch_tokens - offset)
        part = BatchPart(
            request_key=queued.request_key,
            start=queued.next_row,
            stop=queued.next_row + num_rows,
            offset=offset,
            arrived_at=queued.arrived_at,
            return_routing=queued.request.return_routing,
            is_last=num_rows == queued.num_rows_left,
        )
        queue.waiting.sent(queued, num_rows)
        self._budget.send(_place_of(queued, num_rows))
        return part


def _place_of(queued: QueuedRequest, num_rows: int) -> Place:
    request = queued.request
    return Place(request.layer, request.client, num_rows, num_rows * request.tokens[:1].nbytes, queued.level)
