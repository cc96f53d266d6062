"""How fast counters of routers grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.cli.router_views import RouterView

_OUTCOMES = ("num_served", "num_dropped_capacity", "num_dropped_failure")


@dataclass(frozen=True)
class Rates:
    """Of all routers together, between two looks."""

    requests_per_s: float
    tokens_per_s: float
    assignments_per_s: float

    @classmethod
    def between(cls, before: Sequence[RouterView], now: Sequence[RouterView], *, seconds: float) -> Rates:
        """The rates of the routers that are in both looks and were not restarted between them.

        Args:
            before: The earlier look.
            now: The later one.
            seconds: The time between them.
        """
        earlier = {view.address: view for view in before}
        pairs = [
            (earlier[view.address], view)
            for view in now
            if view.address in earlier and view.load["uptime_s"] >= earlier[view.address].load["uptime_s"]
        ]
        grown = [sum(_count(new)[i] - _count(old)[i] for old, new in pairs) for i in range(3)]
        return cls(*(max(0, each) / max(seconds, 1e-3) for each in grown))


def _count(view: RouterView) -> tuple[int, int, int]:
    """Requests, tokens and assignments."""
    layers = view.load["layers"].values()
    assignments = sum(expert[key] for layer in layers for expert in layer["experts"] for key in _OUTCOMES)
    return view.load["num_requests"], sum(layer["num_tokens"] for layer in layers), assignments
