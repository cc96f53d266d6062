"""What the demo found out, and whether that is what it promises."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from moe_runtime.demos.errors import DemoError

if TYPE_CHECKING:
    from pathlib import Path

#: The held-out accuracy that the served layer must reach.
MIN_ACCURACY = 0.96
#: The largest difference from the reference that is put down to rounding.
MAX_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class ExpertResult:
    """How one expert did.

    Attributes:
        name: Unique in the layer.
        kind: Its kind.
        pid: Process id of its actor; 0 where it has none.
        device: Device that it computes on.
        accuracy: Share of the held-out images that it gets right alone.
        num_assignments: Assignments that the gate asked of it.
        share: Share of all assignments.
        num_dropped_capacity: Of them, dropped because it was full.
        num_dropped_failure: Of them, dropped because it was dead, late or wrong.
        mean_ms: Mean time of one of its forwards, at its host.
    """

    name: str
    kind: str
    pid: int
    device: str
    accuracy: float
    num_assignments: int
    share: float
    num_dropped_capacity: int
    num_dropped_failure: int
    mean_ms: float


@dataclass(frozen=True)
class DigitsResult:
    """The outcome of one run.

    Attributes:
        accuracy: Share of the answers that were right, over all requests.
        experts: In the order of the gate's rows.
        max_difference: Largest absolute difference from the reference in one process.
        num_images: Held-out images; each was sent ``num_tokens / num_images`` times.
        num_requests: Requests answered.
        num_tokens: Images in all of them.
        request_sizes: Smallest and largest request, in images.
        concurrency: Requests under way at once.
        num_assignments: Assignments that the gate asked for.
        num_dropped_capacity: Of them, dropped because an expert was full.
        num_dropped_failure: Of them, dropped because an expert was dead, late or wrong.
        batch_sizes: Number of batches by their size in tokens, ascending.
        p50_ms: Median latency at the client.
        p99_ms: 99th percentile of it.
        tokens_per_s: Images answered per second.
        training_s: Seconds that training took; None where the layer was in the cache.
        starting_s: Seconds until the runtime was up.
        config_path: The served configuration.
    """

    accuracy: float
    experts: tuple[ExpertResult, ...]
    max_difference: float
    num_images: int
    num_requests: int
    num_tokens: int
    request_sizes: tuple[int, int]
    concurrency: int
    num_assignments: int
    num_dropped_capacity: int
    num_dropped_failure: int
    batch_sizes: dict[int, int]
    p50_ms: float
    p99_ms: float
    tokens_per_s: float
    training_s: float | None
    starting_s: float
    config_path: Path

    def check(self) -> None:
        """Hold the outcome against the demo's promises.

        Raises:
            DemoError: If the answers differ from the reference by more than rounding, or too many are wrong.
        """
        # Written so that NaN fails.
        if not self.max_difference <= MAX_DIFFERENCE:
            raise DemoError(
                f"expected answers within {MAX_DIFFERENCE:g} of the reference computed in one process, found a "
                f"difference of {self.max_difference:.3g}"
            )
        if not self.accuracy >= MIN_ACCURACY:
            raise DemoError(
                f"expected a held-out accuracy of at least {MIN_ACCURACY:.0%}, found {self.accuracy:.2%} with "
                f"{self.num_dropped_failure} assignments dropped because an expert was dead or late"
            )

    def write_json(self, path: Path) -> None:
        """Write everything to a file as one JSON object."""
        path.write_text(json.dumps({**asdict(self), "config_path": str(self.config_path)}, indent=2) + "\n")
