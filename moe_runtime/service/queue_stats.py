"""Counters of a router's queue: what waited how long, what was refused and why, what left it uncomputed."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

RefusalReason = Literal["tokens", "bytes", "open_requests", "time", "client_share", "draining"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = ("tokens", "bytes", "open_requests", "time", "client_share", "draining")


@dataclass
class LayerWaits:
    """How long requests of one layer waited: from their arrival to the departure of their last row."""

    num_waits: int = 0
    wait_s: float = 0.0


@dataclass
class QueueStats:
    """Counters since the start of the router.

    Refusals are counted in callers' threads, the rest in the service's.

    Attributes:
        num_expired_before_compute: Requests whose deadline passed before any of their rows left the queue.
        num_cancelled_before_compute: Requests that were withdrawn before that.
        num_rows_freed: Rows of requests that ended early which never left the queue.
        waits: By layer.
    """

    num_expired_before_compute: int = 0
    num_cancelled_before_compute: int = 0
    num_rows_freed: int = 0
    waits: dict[str, LayerWaits] = field(default_factory=dict)
    _refused: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refuse(self, reason: RefusalReason) -> None:
        """A request was refused. Thread-safe."""
        with self._lock:
            self._refused[reason] += 1

    def waited(self, layer: str, wait_s: float) -> None:
        """The last row of a request has left the queue."""
        waits = self.waits.setdefault(layer, LayerWaits())
        waits.num_waits += 1
        waits.wait_s += wait_s

    def snapshot(self) -> dict[str, Any]:
        """All counters but those of the layers, as plain values."""
        with self._lock:
            refused = {reason: self._refused[reason] for reason in REFUSAL_REASONS}
        return {
            "refused": refused,
            "num_expired_before_compute": self.num_expired_before_compute,
            "num_cancelled_before_compute": self.num_cancelled_before_compute,
            "num_rows_freed": self.num_rows_freed,
        }

    def of_layer(self, layer: str) -> dict[str, Any]:
        """Number and sum of the waits of a layer."""
        waits = self.waits.get(layer, LayerWaits())
        return {"num_waits": waits.num_waits, "queue_wait_s": waits.wait_s}
