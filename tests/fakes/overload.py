"""A router's queue in front of one host of known speed, on a fake clock: what is answered in time under which load."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fakes.service import FakeClock, make_layer, tokens_of
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import MoERuntimeError, OverloadedError
from moe_runtime.service.batcher import JoinedBatch
from moe_runtime.service.fair_queue import QueuedRequest
from moe_runtime.service.front_door import FrontDoor
from moe_runtime.service.generations import Generations
from moe_runtime.service.lineup import Lineup
from moe_runtime.service.open_requests import OpenRequests
from moe_runtime.service.pending import PendingRequest
from moe_runtime.service.requests import LayerAnswer, LayerRequest
from moe_runtime.service.stats import RouterStats


@dataclass(frozen=True)
class Arrival:
    """A request that comes at a time, whatever became of those before it.

    Until ``repeats_until`` its caller asks again: at once after an answer or an expiry, after a refusal when it was
    told to.
    """

    at: float
    num_tokens: int
    timeout_s: float
    client: str = ""
    repeats_until: float = 0.0


@dataclass
class Outcome:
    """What became of a client's requests; latencies in seconds, by the time of their arrival."""

    in_time: int = 0
    tokens_in_time: int = 0
    late: int = 0
    refused: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)


class QueueAndHost:
    """The service's queue as it is, and a host that takes ``batch_s`` plus ``token_s`` per token, one batch at a time.

    Deadlines, batches and refusals are those of the service; only threads, tensors and waiting are left out.
    """

    def __init__(self, *, batch_s: float, token_s: float, **router: object) -> None:
        self.clock = FakeClock()
        self.clock.time = 0.0
        self.router = RouterConfig(**{"max_batch_tokens": 64, "max_wait_ms": 1.0, **router})
        layer = make_layer(max_batches_in_flight=2)
        lineup = Lineup.of({"layer": layer})
        self.door = FrontDoor(self.router, limits=LimitsConfig(), wake=lambda: None, clock=self.clock)
        self.generations = Generations(
            lineup, self.router, budget=self.door.budget, stats=self.door.stats, clock=self.clock
        )
        self.requests = OpenRequests(
            RouterStats(lineup.stats),
            queue_stats=self.door.stats,
            clock=self.clock,
            on_answered=self.door.inbox.answered,
        )
        self.outcomes: dict[str, Outcome] = {}
        self.most_queued_tokens = 0
        self._batch_s, self._token_s = batch_s, token_s
        self._keys = itertools.count(1)
        self._arrived: dict[int, Arrival] = {}
        self._rows_back: Counter[int] = Counter()
        self._under_way: list[tuple[float, int, JoinedBatch]] = []
        self._coming: list[tuple[float, int, Arrival]] = []
        self._host_is_free_at = 0.0

    @property
    def capacity(self) -> float:
        """Tokens per second in full batches."""
        full = self.router.max_batch_tokens
        return full / (self._batch_s + full * self._token_s)

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """Let the requests come, and work until nothing is left."""
        for arrival in arrivals:
            self._expect(arrival)
        while self._coming or self.door.inbox.num_open or self._under_way:
            next_arrival = self._coming[0][0] if self._coming else float("inf")
            self._advance_to(min(next_arrival, self._next_event_at()))
            while self._coming and self._coming[0][0] <= self.clock.now():
                self._arrive(heapq.heappop(self._coming)[2])
            self._turn()

    def _expect(self, arrival: Arrival) -> None:
        heapq.heappush(self._coming, (arrival.at, next(self._keys), arrival))

    def _repeat(self, arrival: Arrival, *, at: float) -> None:
        if at < arrival.repeats_until:
            self._expect(replace(arrival, at=at))

    def _next_event_at(self) -> float:
        now = self.clock.now()
        waits = (self.generations.seconds_to_next(), self.requests.seconds_to_next_deadline())
        times = [now + max(0.0, wait_s) for wait_s in waits if wait_s is not None]
        times += [self._under_way[0][0]] if self._under_way else []
        return min(times, default=float("inf"))

    def _advance_to(self, time: float) -> None:
        self.clock.advance(max(0.0, time - self.clock.now()))

    def _arrive(self, arrival: Arrival) -> None:
        now, key = self.clock.now(), next(self._keys)
        request = LayerRequest(f"r-{key}", "layer", tokens_of(arrival.num_tokens), client=arrival.client)
        outcome = self.outcomes.setdefault(arrival.client, Outcome())

        def on_done(answer: LayerAnswer | MoERuntimeError) -> None:
            if isinstance(answer, MoERuntimeError):
                outcome.late += 1
            self._repeat(arrival, at=self.clock.now())

        generation = self.generations.current
        pending = PendingRequest(key, request, on_done, now, now + arrival.timeout_s, generation)

        def queue() -> None:
            self.requests.add(pending)
            generation.batcher.add(QueuedRequest(key, request, now))

        try:
            self.door.take_in(request, queue, time_left_s=arrival.timeout_s)
        except OverloadedError as exc:
            outcome.refused += 1
            self._repeat(arrival, at=now + exc.retry_after_ms / 1000.0)
            return
        self._arrived[key] = arrival
        self.most_queued_tokens = max(self.most_queued_tokens, self.door.budget.num_tokens)

    def _turn(self) -> None:
        now = self.clock.now()
        while self._under_way and self._under_way[0][0] <= now:
            self._finish(heapq.heappop(self._under_way)[2])
        self.door.inbox.run_all()
        self.requests.expire()
        while (due := self.generations.next_batch()) is not None:
            joined = due[0]
            took_s = self._batch_s + self._token_s * joined.batch.tokens.shape[0]
            self._host_is_free_at = max(self._host_is_free_at, now) + took_s
            heapq.heappush(self._under_way, (self._host_is_free_at, next(self._keys), joined))

    def _finish(self, joined: JoinedBatch) -> None:
        self.generations.current.batcher.batch_answered(joined)
        for part in joined.parts:
            pending, arrival = self.requests.get(part.request_key), self._arrived[part.request_key]
            if pending is None:
                continue
            self._rows_back[part.request_key] += part.stop - part.start
            if self._rows_back[part.request_key] == arrival.num_tokens:
                outcome = self.outcomes[arrival.client]
                outcome.in_time += 1
                outcome.tokens_in_time += arrival.num_tokens
                outcome.latencies.append((arrival.at, self.clock.now() - arrival.at))
                self.requests.answer(part.request_key, LayerAnswer(pending.request.tokens, None))
