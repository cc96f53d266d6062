"""Which choices of a grid are asked for: shared by the policies in which every token has as many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Grid, Pairs
    from moe_runtime.routing.policy import TokenInfo


def requested_choices(width: int, info: TokenInfo) -> Tensor | None:
    """Which choices the tokens ask for, by their ``k`` and ``mask``, bool ``(num_tokens, width)``; None is all."""
    per_row = info.k if isinstance(info.k, torch.Tensor) else None
    mask = None if info.mask is None else info.mask.bool()[:, None]
    if per_row is None:
        return None if mask is None else mask.expand(-1, width)
    requested = torch.arange(width, device=per_row.device) < per_row[:, None]
    return requested if mask is None else requested & mask


def only_requested(grid: Grid, requested: Tensor | None) -> Grid | Pairs:
    """The choices of a grid that are asked for: in coordinate form, or the grid itself where that is all of them.

    Args:
        grid: All choices.
        requested: Bool ``(num_tokens, k)``; None is all.
    """
    return grid if requested is None else chosen_pairs(grid, requested)


def chosen_pairs(grid: Grid, chosen: Tensor) -> Pairs:
    """Some choices of a grid in coordinate form, by a mask, bool ``(num_tokens, k)``."""
    return grid.pairs.at(chosen.t().reshape(-1).nonzero().squeeze(1))
