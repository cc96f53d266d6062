"""An auction for seats: the quick solver of balanced assignment, in rounds of tensor operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.places import positions_in_group

if TYPE_CHECKING:
    from torch import Tensor

#: Rounds of bids after which an auction ends although rows are without a seat.
MAX_ROUNDS = 1000
# The least raise of a bid, as a share of the mean range of values, over rows that prefer some seat. It bounds what is
# lost against the highest total, per row.
_RAISE = 2.0**-7
# Multiples of these, less their whole parts, fill [0, 1) evenly
# (https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences).
_ROW_STEP, _CLASS_STEP = 0.7548776662466927, 0.5698402909980532


@dataclass
class _Auction:
    """Where the rows sit, and what the seats cost.

    Attributes:
        values: As ``auction`` has them, each row shifted so that its best value is about 0.
        sizes: Seats of each class.
        prices: The lowest bid that holds a seat of each class, once all of its seats are held.
        classes: Class of each row's seat; ``num_classes`` for a row without one.
        bids: What each row bid for its seat.
    """

    values: Tensor
    sizes: Tensor
    prices: Tensor
    classes: Tensor
    bids: Tensor


def auction(values: Tensor, sizes: Tensor, *, prices: Tensor, max_rounds: int = MAX_ROUNDS) -> Tensor:
    """The class of each row's seat, at nearly the highest total value.

    Bertsekas' auction with seats of one class as similar objects (Bertsekas and Castanon, The auction algorithm for the
    transportation problem, Annals of Operations Research 20, 1989, pp. 67-96): rows without a seat bid for their best
    class what it is worth to them above their second-best one and a least raise; a class keeps its highest bids. Where
    it ends by itself, the total is below the highest by at most one and a half such raises per row.

    Args:
        values: Value of a seat of each class to each row, float64 ``(num_rows, num_classes)``; -inf where the row may
            not sit. Each row may sit in two classes at least.
        sizes: Seats of each class, int64 ``(num_classes,)``, as many in all as rows.
        prices: What the first bids start from, any numbers, float64 ``(num_classes,)``. From good ones it is quick;
            bad ones it has to mend raise by raise.
        max_rounds: Rounds after which it ends.

    Returns:
        int64 ``(num_rows,)``; ``num_classes`` for a row that is left without a seat.
    """
    num_rows, num_classes = values.shape
    values = values - values.max(dim=1, keepdim=True).values
    ranges = -values.masked_fill(values.isinf(), 0.0).min(dim=1).values
    # Rows to whom all seats are worth the same still have to outbid each other.
    raise_by = _RAISE * float(ranges.sum() / ranges.count_nonzero().clamp_min(1)) or 1.0
    state = _Auction(
        values=values + 0.5 * raise_by * _tie_breaks(values),
        sizes=sizes,
        prices=prices.clone(),
        classes=sizes.new_full((num_rows,), num_classes),
        bids=values.new_zeros(num_rows),
    )
    _bid(state, raise_by=raise_by, max_rounds=max_rounds)
    return state.classes


def _tie_breaks(values: Tensor) -> Tensor:
    """Numbers in [0, 1), other ones in each row: rows that are alike would all bid for one class at a time."""
    rows = torch.arange(values.shape[0], device=values.device, dtype=values.dtype)
    classes = torch.arange(values.shape[1], device=values.device, dtype=values.dtype)
    return (rows[:, None] * _ROW_STEP + classes * _CLASS_STEP) % 1.0


def _bid(state: _Auction, *, raise_by: float, max_rounds: int) -> None:
    num_classes = state.sizes.shape[0]
    for _ in range(max_rounds):
        standing = (state.classes == num_classes).nonzero().squeeze(1)
        if standing.shape[0] == 0:
            return
        best = (state.values[standing] - state.prices).topk(2, dim=1)
        chosen = best.indices[:, 0]
        state.classes[standing] = chosen
        state.bids[standing] = state.prices[chosen] + best.values[:, 0] - best.values[:, 1] + raise_by
        _keep_highest(state, chosen)


def _keep_highest(state: _Auction, wanted: Tensor) -> None:
    """Takes the seat from every row that was outbid in one of the wanted classes, and puts up their prices."""
    num_classes = state.sizes.shape[0]
    is_wanted = torch.zeros_like(state.sizes, dtype=torch.bool).index_fill(0, wanted, True)
    rows = is_wanted[state.classes].nonzero().squeeze(1)
    classes, bids = state.classes[rows], state.bids[rows]
    counts = torch.bincount(classes, minlength=num_classes)
    order = torch.argsort(bids, descending=True, stable=True)
    positions = positions_in_group(classes, order=order, sizes=counts)
    sizes = state.sizes[classes]
    # The last bid that holds a seat is the price of the class.
    last = (positions == sizes - 1).nonzero().squeeze(1)
    state.prices[classes[last]] = bids[last]
    state.classes[rows[positions >= sizes]] = num_classes
