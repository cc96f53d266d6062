"""Orders and places: which entries of a batch reach an expert, or belong to a token, and in which position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Groups that have numbers of 16 bits, which numpy sorts digit by digit.
_MAX_SHORT = 2**15
#: Up to so many entries, what takes time is the number of calls into torch.
FEW_ENTRIES = 64


def order_by_group(group_ids: Tensor, *, num_groups: int) -> Tensor:
    """The entries by group, and in a group as they stand: a stable sort.

    Args:
        group_ids: Group of each entry, int64 ``(num_entries,)``, each below ``num_groups``.
        num_groups: Number of groups.

    Returns:
        A permutation, int64 ``(num_entries,)``.
    """
    if group_ids.is_cpu and group_ids.shape[0] <= FEW_ENTRIES:
        return torch.from_numpy(group_ids.numpy().argsort(kind="stable"))
    if group_ids.is_cpu and num_groups <= _MAX_SHORT:
        # numpy's radix sort takes an eighth of the time of torch's merge sort at 8,192 entries.
        return torch.from_numpy(group_ids.to(torch.int16).numpy().argsort(kind="stable"))
    return torch.argsort(group_ids, stable=True)


def inverse_permutation(order: Tensor) -> Tensor:
    """Where each entry of a permutation stands in it, int64 of the same length."""
    if order.is_cpu and order.shape[0] <= FEW_ENTRIES:
        return torch.from_numpy(order.numpy().argsort())
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


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
        by_group = order_by_group(group_ids, num_groups=sizes.shape[0])
    else:
        by_group = order[order_by_group(group_ids[order], num_groups=sizes.shape[0])]
    starts = sizes.cumsum(0) - sizes
    return inverse_permutation(by_group) - starts[group_ids]


def count_per_expert(expert_ids: Tensor, *, num_experts: int) -> tuple[int, ...]:
    """How often each expert of ``num_experts`` occurs in a flat tensor."""
    if expert_ids.is_cpu and expert_ids.shape[0] <= FEW_ENTRIES:
        ids = expert_ids.tolist()
        # What no expert has is for `bincount` to refuse.
        if not ids or (min(ids) >= 0 and max(ids) < num_experts):
            return _count_few(ids, num_experts=num_experts)
    return tuple(torch.bincount(expert_ids, minlength=num_experts).tolist())


def _count_few(expert_ids: Sequence[int], *, num_experts: int) -> tuple[int, ...]:
    counts = [0] * num_experts
    for expert_id in expert_ids:
        counts[expert_id] += 1
    return tuple(counts)
