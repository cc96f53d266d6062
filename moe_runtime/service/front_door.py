"""What a request passes to be taken in: limits on what is open and what waits, and on who holds how much of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.service.budget import Place, QueueBudget
from moe_runtime.service.inbox import Inbox
from moe_runtime.service.queue_stats import QueueStats
from moe_runtime.service.shares import ClientShares

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.requests import LayerRequest


class FrontDoor:
    """Takes requests in while there is room for them. Thread-safe but for the parts, which say so themselves.

    Args:
        router: Limits of the queue.
        limits: Says how many requests may be open.
        wake: Makes the service's thread look into the inbox.
        clock: Tells the time.

    Attributes:
        stats: Counts what waits and what is refused.
        budget: What waits.
        inbox: What the service's thread is to do.
    """

    def __init__(self, router: RouterConfig, *, limits: LimitsConfig, wake: Callable[[], None], clock: Clock) -> None:
        self.stats = QueueStats()
        self.budget = QueueBudget(router, clock=clock, stats=self.stats)
        self.inbox = Inbox(
            wake,
            max_open_requests=limits.max_concurrent_requests,
            shares=ClientShares(share=router.max_client_share, clock=clock),
            stats=self.stats,
        )

    def take_in(self, request: LayerRequest, action: Callable[[], None], *, time_left_s: float, level: int = 0) -> None:
        """Give a request its place, and have the service's thread queue it by ``action``.

        Args:
            request: The request.
            action: Queues it.
            time_left_s: Seconds until its deadline.
            level: Of its layer, see ``RoutedLayer``.

        Raises:
            UnavailableError: If no new requests are taken.
            OverloadedError: If there is no room.
        """
        place = _place_of(request, level)
        self.inbox.take_in(
            action,
            client=request.client,
            reserve=lambda: self.budget.reserve(place, time_left_s=time_left_s),
            hint_ms=lambda: self.budget.hint_ms(place),
            level=level,
        )

    def release(self, request: LayerRequest, *, level: int = 0) -> None:
        """Give back the place of a request that was taken in and never queued."""
        self.budget.release(_place_of(request, level))

    def load(self) -> dict[str, Any]:
        """What waits, the limits and the counters, as plain values."""
        return {**self.budget.snapshot(), "requests": self.inbox.num_open, **self.stats.snapshot()}


def _place_of(request: LayerRequest, level: int) -> Place:
    return Place(request.layer, request.client, int(request.tokens.shape[0]), request.tokens.nbytes, level)
