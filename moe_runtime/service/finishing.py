"""What a flight's rows become, once all of them have come back or were given up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.experts.outputs import non_finite_rows
from moe_runtime.routing.combine import combine, rows_by_choice

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.combine import Combined
    from moe_runtime.service.flight import Flight


def combined_of(flight: Flight) -> Combined:
    """The tokens' outputs; of a batch that its caller has routed, the experts' rows."""
    layer, rows, plan, served = flight.layer, flight.expert_rows.collect(), flight.present_plan(), flight.served()
    if flight.batch.assignments is not None:
        return rows_by_choice(rows, plan, served=served)
    return combine(
        flight.batch.tokens,
        rows,
        plan,
        residual=layer.residual,
        weight_on=layer.weight_on,
        served=served,
        exact=layer.exact,
    )


def overflowed(flight: Flight, combined: Combined) -> Tensor | None:
    """Which outputs a weighted sum took out of the dtype's range, bool ``(num_tokens,)``; None if there is none."""
    if flight.layer.allow_non_finite or flight.batch.assignments is not None:
        # Experts' own rows are summed by nobody here, and their hosts have looked at each.
        return None
    return non_finite_rows(combined.outputs)
