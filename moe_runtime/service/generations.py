"""What a router serves now, and what it served before and has not finished: layers may be replaced under load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.service.batcher import Batcher
from moe_runtime.service.validation import validate_request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.service.batcher import JoinedBatch
    from moe_runtime.service.budget import QueueBudget
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.lineup import Lineup
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.queue_stats import QueueStats
    from moe_runtime.service.requests import LayerRequest


@dataclass(frozen=True)
class RouterSetup:
    """What may be replaced while a router runs.

    Attributes:
        layers: By name.
        router: Limits of the batcher and its queue; address, number and labels of routers are not looked at.
    """

    layers: Mapping[str, RoutedLayer]
    router: RouterConfig


@dataclass(frozen=True, eq=False)
class Generation:
    """One setup of a router at work: requests are batched and served by the setup that they were checked against.

    Attributes:
        lineup: Its layers and their table.
        router: Its limits.
        batcher: Holds its requests.
    """

    lineup: Lineup
    router: RouterConfig
    batcher: Batcher

    def check(self, request: LayerRequest, limits: LimitsConfig) -> None:
        """Check a request against its layer and what one request may ask for.

        Raises:
            InvalidRequestError: If it can never be right.
        """
        validate_request(request, self.lineup.layer(request.layer), limits=limits, router=self.router)


class Generations:
    """The present generation, and those that still have requests. Owned by the service's thread but for ``current``.

    Args:
        lineup: Layers of the first one.
        router: Its limits.
        budget: What all of them share.
        stats: Counts what waits, for all of them.
        clock: Tells the time.

    Attributes:
        current: Takes new requests; may be read from any thread.
    """

    def __init__(
        self, lineup: Lineup, router: RouterConfig, *, budget: QueueBudget, stats: QueueStats, clock: Clock
    ) -> None:
        self._budget = budget
        self._stats = stats
        self._clock = clock
        self._leaving: list[Generation] = []
        self.current = self._make(lineup, router)

    def replace(self, lineup: Lineup, router: RouterConfig) -> None:
        """Another one takes new requests from now on; the present one finishes what it has."""
        self._budget.resize(router)
        self._leaving.append(self.current)
        self.current = self._make(lineup, router)

    def next_batch(self) -> tuple[JoinedBatch, Generation] | None:
        """A batch that is due, older generations first, or None."""
        for generation in self._all():
            joined = generation.batcher.next_batch()
            if joined is not None:
                return joined, generation
        return None

    def seconds_to_next(self) -> float | None:
        """How long until a batch falls due if nothing else happens; None if none will."""
        waits = (generation.batcher.seconds_to_next() for generation in self._all())
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    def take_finished(self) -> list[Generation]:
        """The replaced generations that have nothing left, each told once."""
        if not self._leaving:
            return self._leaving
        finished = [generation for generation in self._leaving if generation.batcher.is_idle]
        self._leaving = [generation for generation in self._leaving if generation not in finished]
        return finished

    def _make(self, lineup: Lineup, router: RouterConfig) -> Generation:
        batcher = Batcher(lineup.layers, router=router, budget=self._budget, stats=self._stats, clock=self._clock)
        return Generation(lineup, router, batcher)

    def _all(self) -> Iterator[Generation]:
        yield from self._leaving
        yield self.current
