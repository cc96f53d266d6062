"""Balanced assignment: every expert serves as many tokens, at the highest total score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from scipy.optimize import linear_sum_assignment

from moe_runtime.routing.auction import MAX_ROUNDS, auction
from moe_runtime.routing.places import positions_in_group
from moe_runtime.routing.scaling import gaps_to_best, scale_columns

if TYPE_CHECKING:
    from torch import Tensor

Solver = Literal["auto", "exact", "auction"]

#: Tokens up to which ``auto`` is ``exact``: there both take about as long, and twice as many can take it seconds.
EXACT_UP_TO = 256
# Temperature of the choice that an auction's prices start from, as a share of the mean range of a token's scores.
_SOFTNESS = 2.0**-6
# Beyond float32 the sums of a solver would overflow.
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Seats:
    """A transport problem with as many seats as there are rows.

    The first ``num_tokens`` rows are tokens. Where the experts don't divide them, some experts get a token more than
    the others: every expert has an extra seat then, and stand-ins, which may sit nowhere else, take those that stay
    without a token.

    Attributes:
        values: Score of each row in each class, float64 ``(num_rows, num_classes)``; -inf where it may not sit.
        sizes: Seats of each class, int64 ``(num_classes,)``; their sum is ``num_rows``.
        num_tokens: Rows that are tokens.
        num_experts: A seat of class ``c`` is at expert ``c % num_experts``.
    """

    values: Tensor
    sizes: Tensor
    num_tokens: int
    num_experts: int


def balanced_experts(scores: Tensor, *, solver: Solver, max_rounds: int = MAX_ROUNDS) -> Tensor:
    """The expert of each token, where each serves as many: ``floor`` or ``ceil`` of ``num_tokens / num_experts``.

    Args:
        scores: Finite, ``(num_tokens, num_experts)``.
        solver: ``exact`` has the highest total score, by scipy; ``auction`` one within a percent, as a rule, and is
            quicker in large batches; ``auto`` is by size.
        max_rounds: Rounds of bids after which the auction seats who is left as well as it can.

    Returns:
        int64 ``(num_tokens,)``.
    """
    num_tokens, num_experts = scores.shape
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores.device)
    seats = _seats(scores.detach().double().clamp(-_LARGEST, _LARGEST))
    if solver == "exact" or (solver == "auto" and num_tokens <= EXACT_UP_TO):
        return _exactly(seats)[:num_tokens] % num_experts
    prices = _starting_prices(seats)
    classes = auction(seats.values, seats.sizes, prices=prices, max_rounds=max_rounds)
    return _seat_everyone(seats, classes[:num_tokens])


def _seats(scores: Tensor) -> Seats:
    num_tokens, num_experts = scores.shape
    share, remainder = divmod(num_tokens, num_experts)
    sure = torch.full((num_experts,), share, device=scores.device)
    if remainder == 0:
        return Seats(scores, sure, num_tokens, num_experts)
    stand_ins = scores.new_zeros((num_experts - remainder, num_experts))
    extra = torch.cat([scores, stand_ins])
    if share == 0:
        return Seats(extra, torch.ones_like(sure), num_tokens, num_experts)
    values = torch.cat([torch.cat([scores, torch.full_like(stand_ins, -torch.inf)]), extra], dim=1)
    return Seats(values, torch.cat([sure, torch.ones_like(sure)]), num_tokens, num_experts)


def _starting_prices(seats: Seats) -> Tensor:
    """Prices at which about as many tokens would choose each expert, float64 ``(num_classes,)``.

    An auction that has to find them by raises is slow where many tokens want the same. Extra seats go to the experts
    of the highest prices; to stand-ins the others are worth the same.
    """
    share, remainder = divmod(seats.num_tokens, seats.num_experts)
    scores = seats.values[: seats.num_tokens, -seats.num_experts :]
    # Fewer tokens than experts are not to be spread over all of them: what they think of an expert on average will do.
    prices = _levelling_prices(scores) if share else scores.mean(dim=0)
    if remainder == 0:
        return prices
    extra = prices.clamp_min(prices.topk(remainder).values[-1])
    return torch.cat([prices, extra]) if share else extra


def _levelling_prices(scores: Tensor) -> Tensor:
    """Prices that level the loads of the experts, ``(num_experts,)``, where tokens choose by a softmax."""
    mean_range = float((scores.amax(dim=1) - scores.amin(dim=1)).mean())
    softness = _SOFTNESS * mean_range or 1.0
    factors = scale_columns(gaps_to_best(scores / softness).exp(), tolerance=1e-2, max_iterations=100)
    return -softness * factors.log()


def _exactly(seats: Seats) -> Tensor:
    """The class of each row's seat, int64 ``(num_rows,)``, at the highest total (Jonker-Volgenant)."""
    class_of_seat = torch.arange(seats.sizes.shape[0], device=seats.sizes.device).repeat_interleave(seats.sizes)
    costs = -seats.values[:, class_of_seat]
    columns = torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])
    return class_of_seat[columns.to(class_of_seat.device)]


def _seat_everyone(seats: Seats, classes: Tensor) -> Tensor:
    """The expert of each token, those included that an auction left standing when it was ended.

    Args:
        seats: The problem.
        classes: Class of each token's seat, int64 ``(num_tokens,)``; ``num_classes`` for one without a seat.
    """
    num_classes, num_experts = seats.sizes.shape[0], seats.num_experts
    share, remainder = divmod(seats.num_tokens, num_experts)
    seated = classes < num_classes
    if bool(seated.all()):
        return classes % num_experts
    # The first class with an extra seat; without the stand-ins, more of those seats may be taken than there should be.
    first_extra = num_classes - num_experts if remainder else num_classes
    in_extra = (seated & (classes >= first_extra)).nonzero().squeeze(1)
    seated[in_extra[remainder:]] = False
    free = torch.full((num_experts,), share, device=classes.device)
    with_extra = classes[in_extra[:remainder]] % num_experts
    without_extra = torch.ones(num_experts, dtype=torch.bool, device=classes.device).index_fill(0, with_extra, False)
    free[with_extra] += 1
    free[without_extra.nonzero().squeeze(1)[: remainder - with_extra.shape[0]]] += 1
    experts = classes % num_experts
    free -= torch.bincount(experts[seated], minlength=num_experts)
    waiting = (~seated).nonzero().squeeze(1)
    scores = seats.values[waiting, -num_experts:]
    return experts.index_copy(0, waiting, _fill(scores, free))


def _fill(scores: Tensor, free: Tensor) -> Tensor:
    """Experts of tokens, ``(num_tokens,)``: each its best one with a free place, until all ``free`` ones are taken."""
    num_tokens, num_experts = scores.shape
    experts = torch.zeros(num_tokens, dtype=torch.int64, device=scores.device)
    waiting = torch.arange(num_tokens, device=scores.device)
    # Every round but the last fills an expert.
    while waiting.shape[0] > 0:
        best = scores[waiting].masked_fill(free == 0, -torch.inf).max(dim=1)
        sizes = torch.bincount(best.indices, minlength=num_experts)
        order = torch.argsort(best.values, descending=True, stable=True)
        fits = positions_in_group(best.indices, order=order, sizes=sizes) < free[best.indices]
        experts[waiting[fits]] = best.indices[fits]
        free = free - torch.bincount(best.indices[fits], minlength=num_experts)
        waiting = waiting[~fits]
    return experts
