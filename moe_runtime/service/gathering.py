"""The rows that go out to experts, gathered from a batch's tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moe_runtime.routing.combine import gather_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from moe_runtime.service.dispatch import HostMessage
    from moe_runtime.service.flight import Flight
    from moe_runtime.service.ports import Transport

#: Up to this many bytes of a batch, one pass over its rows is quicker than one per host.
_GATHER_AT_ONCE_BYTES = 64 << 10


def gather_messages(
    flight: Flight, messages: Iterable[HostMessage], transport: Transport
) -> Iterator[tuple[HostMessage, Tensor]]:
    """Each message of a dispatch with its rows: large ones straight into the transport's memory, small ones at once."""
    layer, plan, tokens = flight.layer, flight.plan, flight.batch.tokens
    gather = partial(gather_rows, tokens, plan, weight_on=layer.weight_on)
    if plan.num_planned * layer.item_size * layer.row_dtype.itemsize <= _GATHER_AT_ONCE_BYTES:
        is_token = plan.admission.assignments.num_tokens == 1 == tokens.shape[0] and layer.weight_on == "output"
        every_row = (tokens if is_token else gather()).to(layer.row_dtype)
        for message in messages:
            yield message, _rows_of(message, every_row, is_token=is_token)
        return
    for message in messages:
        shape = (message.num_rows, *layer.item_shape)
        memory = transport.allocate(message.endpoint, shape, layer.row_dtype)
        yield message, gather(planned_ids=message.planned_ids(), out=memory)


def _rows_of(message: HostMessage, every_row: Tensor, *, is_token: bool) -> Tensor:
    if not is_token:
        return every_row[message.planned_ids()]
    # All rows are the only token: nothing need be looked up.
    return every_row if message.num_rows == 1 else every_row.repeat_interleave(message.num_rows, 0)


def gather_anew(flight: Flight, message: HostMessage) -> Tensor:
    """The rows of one message that goes out after the dispatch."""
    layer = flight.layer
    # Rows that carry their weights to the expert need those of the expert that they were moved to.
    plan = flight.present_plan() if layer.weight_on == "input" else flight.plan
    rows = gather_rows(flight.batch.tokens, plan, weight_on=layer.weight_on, planned_ids=message.planned_ids())
    return rows.to(layer.row_dtype)
