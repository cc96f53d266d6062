"""Balance while serving: its rules from the recipes, and whoever makes its steps where there is no controller."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from moe_runtime.service.online_bias import AskedCounts, BiasRule, OnlineBias
from moe_runtime.service.ports import MonotonicClock
from moe_runtime.service.routing_table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moe_runtime.launch.recipes import LayerRecipe
    from moe_runtime.launch.router_process import RouterProcess
    from moe_runtime.service.ports import Clock

#: Routers that are threads of this process never restart.
_INCARNATION = 1


def bias_rules(layers: Iterable[LayerRecipe]) -> dict[str, BiasRule]:
    """How the selection bias moves, of each layer where it does."""
    return {
        layer.name: BiasRule(
            experts=tuple(expert.spec.name for expert in layer.experts[: layer.num_routed]),
            rate=layer.balance.rate,
            interval_s=layer.balance.interval_s,
            min_assignments=layer.balance.min_assignments,
        )
        for layer in layers
        if layer.balance.online_bias
    }


class LocalBalance:
    """Does for the routers of this process what a controller does for those on Ray, in a thread of its own.

    Args:
        rules: By layer.
        routers: They have started.
        table: The one that they route by.
        clock: Tells the time.
    """

    def __init__(
        self,
        rules: Mapping[str, BiasRule],
        *,
        routers: Sequence[RouterProcess],
        table: RoutingTable,
        clock: Clock | None = None,
    ) -> None:
        self._routers = tuple(routers)
        self._table = table
        self._clock = clock or MonotonicClock()
        self._bias = OnlineBias()
        self._bias.follow(rules)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-balance", daemon=True)

    @property
    def table(self) -> RoutingTable:
        """The one that the routers route by."""
        return self._table

    def start(self) -> None:
        """Begin, if there is anything to balance."""
        if self._bias.layers:
            self._thread.start()

    def stop(self) -> None:
        """Make no more steps. Safe to call twice, and before ``start``."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def turn(self) -> None:
        """Count what the routers were asked for, and have them route by new biases where a step is due."""
        for index, router in enumerate(self._routers):
            self._bias.take(index, AskedCounts(_INCARNATION, router.asked(self._bias.layers)))
        if self._bias.step(self._clock.now()):
            self._table = RoutingTable(self._table.version + 1, self._table.replicas, self._bias.biases)
            for router in self._routers:
                router.set_table(self._table)

    def _run(self) -> None:
        # The first turn is where counting begins.
        self.turn()
        while not self._stopping.wait(self._bias.poll_every_s):
            self.turn()
