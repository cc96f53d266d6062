"""A layer used as a library does: the engine in this process, driven directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.errors import BenchError
from moe_runtime.routing.gates import LinearGate
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Transport
    from moe_runtime.service.routing_table import RoutingTable

_POLL_S = 1.0


class LibraryLayer:
    """An engine of one layer on hosts that are running; used by one thread."""

    def __init__(self, layer: RoutedLayer, table: RoutingTable, transport: Transport, *, node: str) -> None:
        """Route through a table; the transport is closed with the layer.

        Args:
            layer: What is served.
            table: Where its experts are.
            transport: How they are reached.
            node: Name of this node.
        """
        # More would wait, spinning, for cores that the experts are using.
        torch.set_num_threads(1)
        self.layer = layer
        self._transport = transport
        self.engine = RouterEngine({layer.name: layer}, transport, node=node)
        self.engine.set_table(table)

    @property
    def gate_weight(self) -> Tensor:
        """The linear gate's weight, ``(num_experts, features)``."""
        return gate_weight(self.layer)

    def forward(self, tokens: Tensor, *, k: int | None = None) -> BatchResult:
        """One batch from start to end, with ``k`` experts per token where that is not the layer's own number.

        Raises:
            BenchError: If an expert did not serve its rows.
        """
        self.engine.submit(Batch(self.layer.name, tokens, info=TokenInfo(k=k)))
        while True:
            for result in self.engine.poll(_POLL_S):
                if result.failures is not None:
                    reasons = {attempt.expert_id: attempt.reason for attempt in result.failures.attempts}
                    raise BenchError(f"experts failed: {reasons}")
                return result

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()


def gate_weight(layer: RoutedLayer) -> Tensor:
    """The weight of a layer's gate, ``(num_experts, features)``.

    Raises:
        BenchError: If the gate is not linear.
    """
    if not isinstance(layer.gate, LinearGate):
        raise BenchError(f"layer {layer.name}: expected a linear gate, found {type(layer.gate).__name__}")
    return layer.gate.weight
