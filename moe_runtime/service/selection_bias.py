"""The bias by which a batch's experts are selected: the gate's own, and what serving has added to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.policy import TokenInfo
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.routing_table import RoutingTable


class SelectionBias:
    """Gives the bias of each layer, made once per table. Owned by one thread."""

    def __init__(self) -> None:
        """Make nothing yet."""
        self._table: RoutingTable | None = None
        self._tensors: dict[str, Tensor | None] = {}

    def give(self, info: TokenInfo, layer: RoutedLayer, table: RoutingTable) -> TokenInfo:
        """What is known of a batch's tokens, with the bias by which their experts are selected.

        Args:
            info: What is known of them otherwise.
            layer: Their layer; nothing changes where its policy uses no bias.
            table: The one that their batch uses.
        """
        if not layer.policy.uses_bias:
            return info
        if table is not self._table:
            self._table, self._tensors = table, {}
        if layer.name not in self._tensors:
            self._tensors[layer.name] = _sum_of(layer, table)
        return replace(info, expert_bias=self._tensors[layer.name])


def _sum_of(layer: RoutedLayer, table: RoutingTable) -> Tensor | None:
    own, added = layer.gate.expert_bias, table.biases.get(layer.name)
    if added is None:
        return own
    # A step is the same wherever it starts, but for a constant, which selects nothing: so nobody who makes steps has
    # to know the bias that a gate was trained to.
    moved = torch.tensor(added.values, dtype=torch.float32)
    return moved if own is None else own + moved
