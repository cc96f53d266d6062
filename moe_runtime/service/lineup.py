"""The layers that a router serves, with the routing table that was made for them: a batch uses one such pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.errors import UnknownLayerError
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.service.selection_bias import SelectionBias
from moe_runtime.service.stats import LayerStats

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from moe_runtime.service.layer import RoutedLayer


@dataclass(eq=False)
class Lineup:
    """Layers and their table, which say the same of which expert is which row of a gate.

    Attributes:
        layers: By name.
        stats: Counters of each layer.
        table: The newest table that was made for these layers.
        selection_bias: Of the layers, by that table.
    """

    layers: Mapping[str, RoutedLayer]
    stats: Mapping[str, LayerStats]
    table: RoutingTable
    selection_bias: SelectionBias = field(default_factory=SelectionBias)

    @classmethod
    def of(cls, layers: Mapping[str, RoutedLayer]) -> Lineup:
        """The first line-up of a router: counters at zero, and no replica of anything."""
        return cls(dict(layers), {name: LayerStats.for_layer(layer) for name, layer in layers.items()}, RoutingTable())

    def replaced_by(self, layers: Mapping[str, RoutedLayer]) -> Lineup:
        """The line-up that comes after this one, still without a replica; what keeps its name counts on."""
        stats = {
            name: self.stats[name].carried_to(layer, from_layer=self.layers[name])
            if name in self.stats
            else LayerStats.for_layer(layer)
            for name, layer in layers.items()
        }
        return Lineup(dict(layers), stats, RoutingTable())

    def asked(self, layers: Collection[str]) -> dict[str, dict[str, int]]:
        """Assignments that each expert of some layers was asked for since the start, by layer and name."""
        known = {name: layer for name, layer in self.layers.items() if name in layers}
        return {
            name: {e.name: own.num_asked for e, own in zip(layer.experts, self.stats[name].experts, strict=True)}
            for name, layer in known.items()
        }

    def layer(self, name: str) -> RoutedLayer:
        """The layer of that name.

        Raises:
            UnknownLayerError: If there is none.
        """
        try:
            return self.layers[name]
        except KeyError:
            known = ", ".join(sorted(self.layers))
            raise UnknownLayerError(f"expected one of the layers {known}, found {name!r}") from None
