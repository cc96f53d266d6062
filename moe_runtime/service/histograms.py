"""Histograms of a router: what every layer's batches and every expert's rows have taken since the start."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.service.batch import StageTimes

#: Upper bounds in seconds: of what a router does by itself, and waits for.
SECONDS_BOUNDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
TOKENS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
RATIO_BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Histogram:
    """Counts values by fixed bounds. One thread adds; any may read, and may then miss what is just being added.

    Attributes:
        bounds: Upper bounds, ascending; a value equal to a bound counts below it.
        counts: Values per bound, not cumulated, and at the end those above all bounds.
        sum: Sum of all values.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS_BOUNDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def num_values(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


def _of_tokens() -> Histogram:
    return Histogram(TOKENS_BOUNDS)


def _of_ratios() -> Histogram:
    return Histogram(RATIO_BOUNDS)


@dataclass(frozen=True)
class LayerHistograms:
    """Histograms of one layer.

    Attributes:
        batch_tokens: Tokens per batch.
        load_ratio: Per batch, rows of the busiest expert over the mean of all experts of the layer that are not shared.
        queue_s: Per part of a request in a batch: from its arrival to the batch's dispatch.
        gate_s: Per batch: gate, policy, capacity and plan.
        experts_s: Per batch: from its dispatch to the last answer.
        combine_s: Per batch: weighted sum and residual.
    """

    batch_tokens: Histogram = field(default_factory=_of_tokens)
    load_ratio: Histogram = field(default_factory=_of_ratios)
    queue_s: Histogram = field(default_factory=Histogram)
    gate_s: Histogram = field(default_factory=Histogram)
    experts_s: Histogram = field(default_factory=Histogram)
    combine_s: Histogram = field(default_factory=Histogram)

    def count_batch(self, times: StageTimes, *, num_tokens: int, num_rows: int, rows_per_expert: Sequence[int]) -> None:
        """Add a finished batch, of whose ``num_rows`` routed rows the experts that are not shared had so many each."""
        self.batch_tokens.add(num_tokens)
        self.gate_s.add(times.gate_s)
        self.experts_s.add(times.experts_s)
        self.combine_s.add(times.combine_s)
        if num_rows:
            self.load_ratio.add(max(rows_per_expert) * len(rows_per_expert) / num_rows)


@dataclass(frozen=True)
class ExpertHistograms:
    """Histograms of one expert, in seconds per answered message part.

    Attributes:
        compute_s: The matrix product, as its host measured it.
        wait_s: The rest, from the sending of the rows to the answer: the way there and back, and the host's queue.
    """

    compute_s: Histogram = field(default_factory=Histogram)
    wait_s: Histogram = field(default_factory=Histogram)

    def count_product(self, compute_s: float, *, taken_s: float) -> None:
        """Add an answer that came ``taken_s`` after its rows were sent."""
        self.compute_s.add(compute_s)
        self.wait_s.add(max(0.0, taken_s - compute_s))
