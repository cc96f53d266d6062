"""Which experts the tokens of a batch go to: by gate and policy, or as its caller says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.routing.assignments import Admission
from moe_runtime.routing.capacity import admit

if TYPE_CHECKING:
    from moe_runtime.service.batch import Batch
    from moe_runtime.service.lineup import Lineup


def route(batch: Batch, lineup: Lineup) -> Admission:
    """The assignments of a batch that found a place; what it asks for is counted.

    Raises:
        InvalidRequestError: If the layer's caller is to route and the batch has no assignments.
    """
    layer = lineup.layers[batch.layer]
    if batch.assignments is not None:
        lineup.stats[layer.name].count_asked(batch.assignments)
        return Admission(batch.assignments, capacity=None)
    gate_input = batch.tokens.flatten(1) if batch.gate_input is None else batch.gate_input
    router_logits = layer.gate(gate_input, tasks=batch.tasks)
    info = lineup.selection_bias.give(batch.info, layer, lineup.table)
    assignments = layer.policy.assign(router_logits, info)
    lineup.stats[layer.name].count_asked(assignments)
    admission = admit(assignments, layer.capacity, row_seeds=batch.info.row_seeds)
    return layer.add_shared(admission, gate_input, mask=batch.info.mask)
