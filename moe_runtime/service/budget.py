"""Bounds what waits in a router's queue: in tokens, in bytes, in time, and per client."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import OverloadedError
from moe_runtime.service.fair_queue import turn_tokens
from moe_runtime.service.pace import Pace, ServedLately
from moe_runtime.service.shares import ClientShares

if TYPE_CHECKING:
    from moe_runtime.config.runtime import RouterConfig
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.queue_stats import QueueStats, RefusalReason

#: A request is taken in if it should be answered within this part of the time that it has left: what is estimated is
#: sometimes late, and an answer that is late was computed for nothing.
_USABLE_TIME = 0.75
#: A batch's time, and half of one until there is a slot for it.
_WITH_WAIT_FOR_SLOT = 1.5
#: With more clients than this, what is ahead of one is bounded rather than added up.
_MOST_CLIENTS_SUMMED = 64
#: Names of clients come from outside.
_MOST_COMEBACKS = 4096
_SHORTEST_HINT_S = 0.001
_LONGEST_HINT_S = 5.0
#: The hint where nobody knows yet how fast the queue moves.
_BLIND_HINT_S = 0.1


@dataclass(frozen=True)
class Place:
    """What a request, or some of its rows, take of the queue."""

    layer: str
    client: str
    num_tokens: int
    num_bytes: int
    level: int = 0


class _LevelLoad:
    """What waits for all layers of one level of nesting, and whose it is."""

    def __init__(self, share: float, clock: Clock) -> None:
        self.token_shares = ClientShares(share=share, clock=clock)
        self.byte_shares = ClientShares(share=share, clock=clock)
        self.num_tokens = 0
        self.num_bytes = 0


@dataclass(frozen=True)
class _LayerLoad:
    """What waits for one layer, how fast it goes, whose it was lately, and until when who was told to stay away."""

    tokens: Counter[str] = field(default_factory=Counter)
    pace: Pace = field(default_factory=Pace)
    served: ServedLately = field(default_factory=ServedLately)
    comebacks: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.tokens.total()


class QueueBudget:
    """How much may wait. Thread-safe.

    Besides tokens and bytes, a queue is bounded in time: a request is refused at once where what waits before it
    would take ``max_queued_s``, or so long that its own answer would probably be late. Nothing is refused for the
    time it would take while nothing waits, or as long as nobody knows how long that would be.

    Each level of nesting has these limits for itself: requests for a layer that is an expert of another one are what
    those of that one wait for, and must not wait behind them.

    Args:
        router: The limits.
        clock: Tells the time.
        stats: Counts what is refused.
    """

    def __init__(self, router: RouterConfig, *, clock: Clock, stats: QueueStats) -> None:
        self._router = router
        self._clock = clock
        self._stats = stats
        self._lock = threading.Lock()
        self._loads: dict[str, _LayerLoad] = {}
        self._levels = {0: _LevelLoad(router.max_client_share, clock)}

    @property
    def num_tokens(self) -> int:
        """Tokens that wait."""
        return sum(level.num_tokens for level in self._levels.values())

    @property
    def num_bytes(self) -> int:
        """Their bytes."""
        return sum(level.num_bytes for level in self._levels.values())

    def resize(self, router: RouterConfig) -> None:
        """Other limits from now on; what waits already may exceed them."""
        with self._lock:
            self._router = router
            for level in self._levels.values():
                level.token_shares.share = level.byte_shares.share = router.max_client_share

    def pace(self, layer: str) -> Pace:
        """How fast a layer goes; for the one thread that measures it."""
        with self._lock:
            return self._load(layer).pace

    def hint_ms(self, place: Place) -> float:
        """When it is worth asking for a place again, in milliseconds."""
        with self._lock:
            return self._hint_ms(place)

    def reserve(self, place: Place, *, time_left_s: float) -> None:
        """Take a place in the queue.

        Args:
            place: What is asked for.
            time_left_s: Seconds until the request's deadline.

        Raises:
            OverloadedError: If there is none; says when it is worth trying again.
        """
        with self._lock:
            # Both are asked, whatever the answer: whoever asks is active.
            level, client = self._level(place), place.client
            within_tokens = level.token_shares.may_take(client, place.num_tokens, whole=self._router.max_queued_tokens)
            within_bytes = level.byte_shares.may_take(client, place.num_bytes, whole=self._router.max_queued_bytes)
            self._check_room(place)
            if not (within_tokens and within_bytes):
                raise self._refusal(place, "client_share", self._share_spent(place))
            self._check_time(place, time_left_s)
            self._take(place, 1)

    def release(self, place: Place) -> None:
        """Give a place, or a part of one, back: its rows wait no more, and go nowhere."""
        with self._lock:
            self._take(place, -1)

    def send(self, place: Place) -> None:
        """Give a place, or a part of one, back: its rows go to the experts."""
        with self._lock:
            self._take(place, -1)
            self._load(place.layer).served.add(place.client, place.num_tokens, now=self._clock.now())

    def snapshot(self) -> dict[str, Any]:
        """What waits, the limits, and the pace of each layer where it is known, as plain values."""
        with self._lock:
            return {
                "tokens": self.num_tokens,
                "bytes": self.num_bytes,
                "max_tokens": self._router.max_queued_tokens,
                "max_bytes": self._router.max_queued_bytes,
                "num_active_clients": max(level.token_shares.num_active for level in self._levels.values()),
                "tokens_per_s": {
                    layer: load.pace.tokens_per_s
                    for layer, load in self._loads.items()
                    if load.pace.tokens_per_s is not None
                },
            }

    def _check_room(self, place: Place) -> None:
        level = self._level(place)
        most_tokens, most_bytes = self._router.max_queued_tokens, self._router.max_queued_bytes
        if level.num_tokens + place.num_tokens > most_tokens:
            raise self._refusal(place, "tokens", _full("tokens", level.num_tokens, place.num_tokens, most_tokens))
        if level.num_bytes + place.num_bytes > most_bytes:
            raise self._refusal(place, "bytes", _full("bytes", level.num_bytes, place.num_bytes, most_bytes))

    def _check_time(self, place: Place, time_left_s: float) -> None:
        load = self._load(place.layer)
        if load.pace.tokens_per_s is None or not load.num_tokens:
            return
        ahead = self._tokens_ahead(place, load)
        wait_s = load.pace.seconds_for(ahead)
        if ahead >= load.pace.batch_tokens and wait_s > self._router.max_queued_s:
            reason = f"{wait_s:.3f} s of work wait before this request, more than {self._router.max_queued_s} s"
            raise self._refusal(place, "time", reason)
        # What the next batch has room for takes no longer than that: else the queue would never fill it.
        num_batches = max(0, math.ceil((ahead + place.num_tokens) / load.pace.batch_tokens) - 1)
        finish_s = load.pace.seconds_for(num_batches * load.pace.batch_tokens) + _WITH_WAIT_FOR_SLOT * load.pace.batch_s
        if finish_s > _USABLE_TIME * time_left_s:
            reason = f"the answer would take about {finish_s:.3f} s, and the deadline is in {time_left_s:.3f} s"
            raise self._refusal(place, "time", reason)

    def _tokens_ahead(self, place: Place, load: _LayerLoad) -> float:
        """Tokens that leave the layer's queue before the place's: the clients take turns."""
        own = load.tokens[place.client]
        each = max(own + place.num_tokens, turn_tokens(self._router.max_batch_tokens))
        others = len(load.tokens) - (place.client in load.tokens)
        if others > _MOST_CLIENTS_SUMMED:
            waiting = min(load.num_tokens, own + others * each)
        else:
            waiting = own + sum(min(held, each) for client, held in load.tokens.items() if client != place.client)
        # Others who hardly wait, because they ask for little, overtake as they have done lately.
        return max(float(waiting), own / self._part_of_pace(place, load))

    def _part_of_pace(self, place: Place, load: _LayerLoad) -> float:
        """Which part of a layer's pace a client can expect: what it had lately, and an equal part at least."""
        now = self._clock.now()
        num_waiting = len(load.tokens) + (place.client not in load.tokens)
        return max(load.served.share(place.client, now=now), 1.0 / max(num_waiting, load.served.num_clients(now=now)))

    def _take(self, place: Place, sign: int) -> None:
        num_tokens, num_bytes = sign * place.num_tokens, sign * place.num_bytes
        tokens = self._load(place.layer).tokens
        tokens[place.client] += num_tokens
        if not tokens[place.client]:
            del tokens[place.client]
        level = self._level(place)
        level.token_shares.take(place.client, num_tokens)
        level.byte_shares.take(place.client, num_bytes)
        level.num_tokens += num_tokens
        level.num_bytes += num_bytes

    def _load(self, layer: str) -> _LayerLoad:
        return self._loads.setdefault(layer, _LayerLoad())

    def _level(self, place: Place) -> _LevelLoad:
        level = self._levels.get(place.level)
        if level is None:
            level = _LevelLoad(self._router.max_client_share, self._clock)
            # A new dictionary: `num_tokens` and `num_bytes` read the old one without the lock.
            self._levels = {**self._levels, place.level: level}
        return level

    def _share_spent(self, place: Place) -> str:
        held = self._level(place).token_shares.held(place.client)
        return (
            f"the client holds {held} tokens of {self._router.max_queued_tokens}, "
            f"and may hold {self._router.max_client_share:g} of the queue while others want it"
        )

    def _refusal(self, place: Place, reason: RefusalReason, words: str) -> OverloadedError:
        self._stats.refuse(reason)
        retry_after_ms = self._hint_ms(place)
        return OverloadedError(
            f"the router's queue is full: {words}; try again in {retry_after_ms:.0f} ms", retry_after_ms=retry_after_ms
        )

    def _hint_ms(self, place: Place) -> float:
        """Callers are told to come back one after the other, at the pace at which they can be served.

        The first is told to before the queue has run dry. All of them at once would be refused again, but for a few.
        """
        load, now = self._load(place.layer), self._clock.now()
        if load.pace.tokens_per_s is None:
            return 1000.0 * _BLIND_HINT_S
        part = self._part_of_pace(place, load)
        half_gone_at = now + 0.5 * load.pace.seconds_for(load.num_tokens)
        comeback_at = max(load.comebacks.get(place.client, now), half_gone_at)
        comeback_at = min(comeback_at + load.pace.seconds_for(place.num_tokens) / part, now + _LONGEST_HINT_S)
        if len(load.comebacks) > _MOST_COMEBACKS:
            load.comebacks.clear()
        load.comebacks[place.client] = comeback_at
        return 1000.0 * max(comeback_at - now, _SHORTEST_HINT_S)


def _full(unit: str, queued: int, more: int, most: int) -> str:
    return f"{queued} {unit} wait, {more} more would exceed {most}"
