"""Joins requests of one layer into batches."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.service.joining import BatchPart, build_batch
from moe_runtime.service.returning import ReturningCallers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.runtime import RouterConfig
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.budget import QueueBudget
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.requests import LayerRequest


@dataclass
class QueuedRequest:
    """A request in the queue, and how many of its rows have left it."""

    request_key: int
    request: LayerRequest
    arrived_at: float
    next_row: int = 0

    @property
    def num_rows_left(self) -> int:
        """Rows that are still waiting."""
        return int(self.request.tokens.shape[0]) - self.next_row


@dataclass(frozen=True)
class JoinedBatch:
    """A batch, whose rows it holds, and the clock time when it left the queue."""

    batch: Batch
    parts: tuple[BatchPart, ...]
    joined_at: float

    @property
    def num_last_parts(self) -> int:
        """Requests of which nothing is left to come."""
        return sum(part.is_last for part in self.parts)


@dataclass
class _LayerQueue:
    layer: RoutedLayer
    callers: ReturningCallers
    waiting: deque[QueuedRequest] = field(default_factory=deque)
    num_tokens: int = 0
    num_in_flight: int = 0
    slot_was_freed: bool = False


class Batcher:
    """Queues requests per layer and says which batch goes next. Owned by one thread.

    A request is dispatched at once when its layer has nothing in flight. Otherwise it waits for batch-mates
    until ``max_batch_tokens`` have come together, until ``max_wait_ms`` have passed since the oldest came, or
    until a batch returns to a layer all of whose slots were taken; and in any case for a free slot
    (``max_batches_in_flight``). Idle or not, it waits for callers that were answered just now
    (``ReturningCallers``). A request with more rows than a batch may hold is split.

    Args:
        layers: The layers, by name.
        router: Holds the limits of a batch.
        budget: Gets back the place of whatever leaves the queue.
        clock: Tells the time.
    """

    def __init__(
        self, layers: Mapping[str, RoutedLayer], *, router: RouterConfig, budget: QueueBudget, clock: Clock
    ) -> None:
        self._max_batch_tokens = router.max_batch_tokens
        self._max_wait_s = router.max_wait_ms / 1000.0
        self._queues = {name: _LayerQueue(layer, ReturningCallers(self._max_wait_s)) for name, layer in layers.items()}
        self._budget = budget
        self._clock = clock

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and no batch is under way."""
        return not any(queue.waiting or queue.num_in_flight for queue in self._queues.values())

    def add(self, queued: QueuedRequest) -> None:
        """Put a request, whose place in the budget is reserved, at the end of its layer's queue."""
        queue = self._queues[queued.request.layer]
        queue.waiting.append(queued)
        queue.num_tokens += queued.num_rows_left
        queue.callers.arrived(self._clock.now())

    def remove(self, request_key: int, layer: str) -> None:
        """Take whatever rows of a request still wait out of the queue."""
        queue = self._queues[layer]
        for queued in queue.waiting:
            if queued.request_key == request_key:
                queue.waiting.remove(queued)
                queue.num_tokens -= queued.num_rows_left
                self._release(queued, queued.num_rows_left)
                return

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
        now = self._clock.now()
        callers = self._queues[joined.batch.layer].callers
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
            "queued_tokens": queue.num_tokens,
            "batches_in_flight": queue.num_in_flight,
        }

    def _due_at(self, queue: _LayerQueue, now: float) -> float | None:
        """Clock time when the next batch of a layer falls due if nothing else happens; None if none will."""
        if not queue.waiting or queue.num_in_flight >= queue.layer.max_batches_in_flight:
            return None
        if queue.num_tokens >= self._max_batch_tokens:
            return now
        oldest = queue.waiting[0]
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
            queued = queue.waiting[0]
            alone = self._travels_alone(queued, queue)
            if alone and taken:
                break
            part = self._take(queued, offset=num_tokens)
            taken.append((queued, part))
            num_tokens += part.stop - part.start
            if queued.num_rows_left == 0:
                queue.waiting.popleft()
            if alone:
                break
        queue.num_tokens -= num_tokens
        parts = tuple(part for _, part in taken)
        return JoinedBatch(build_batch([(q.request, p) for q, p in taken], queue.layer), parts, joined_at=now)

    def _travels_alone(self, queued: QueuedRequest, queue: _LayerQueue) -> bool:
        return queued.request.options.isolated or queue.layer.isolates_requests

    def _take(self, queued: QueuedRequest, *, offset: int) -> BatchPart:
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
        queued.next_row += num_rows
        self._release(queued, num_rows)
        return part

    def _release(self, queued: QueuedRequest, num_rows: int) -> None:
        row_bytes = queued.request.tokens[:1].nbytes
        self._budget.release(num_rows, num_rows * row_bytes)
