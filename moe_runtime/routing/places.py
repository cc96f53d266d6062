"""Places in groups: in which position each entry of a batch reaches its expert, or its token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def positions_in_group(group_ids: Tensor, *, order: Tensor | None, sizes: Tensor) -> Tensor:
    """How many entries of the same group come before each entry.

    Args:
        group_ids: Group of each entry, int64 ``(num_entries,)``.
        order: Entries in the order they are served, a permutation ``(num_entries,)``; as they stand when None.
        sizes: Entries per group, int64 ``(num_groups,)``.

    Returns:
        int64 ``(num_entries,)``, in the order of ``group_ids``.
    """
    if order is None:
        by_group = torch.argsort(group_ids, stable=True)
    else:
        by_group = order[torch.argsort(group_ids[order], stable=True)]
    starts = sizes.cumsum(0) - sizes
    ranked = torch.arange(group_ids.shape[0], device=group_ids.device)
    return torch.empty_like(ranked).scatter(0, by_group, ranked) - starts[group_ids]
