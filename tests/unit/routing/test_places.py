"""Orders by group, their inverses, and places in groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_runtime.routing.places import (
    FEW_ENTRIES,
    count_per_expert,
    inverse_permutation,
    order_by_group,
    positions_in_group,
)

GROUPS = torch.tensor([2, 0, 2, 1, 0])


def test_entries_stand_by_group_and_in_a_group_as_before() -> None:
    assert order_by_group(GROUPS, num_groups=3).tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("num_groups", [1, 7, 255, 256, 32_768, 32_769, 70_000])
def test_the_order_is_that_of_torchs_stable_sort_whatever_the_number_of_groups(num_groups: int) -> None:
    groups = torch.randint(num_groups, (5_000,), generator=torch.Generator().manual_seed(num_groups))
    groups[:2] = torch.tensor([num_groups - 1, 0])

    order = order_by_group(groups, num_groups=num_groups)

    assert order.dtype == torch.int64
    assert torch.equal(order, torch.argsort(groups, stable=True))


def test_no_entries_have_an_empty_order() -> None:
    assert order_by_group(GROUPS[:0], num_groups=3).tolist() == []
    assert inverse_permutation(GROUPS[:0]).tolist() == []


def test_the_inverse_of_an_order_says_where_each_entry_stands() -> None:
    assert inverse_permutation(torch.tensor([1, 4, 3, 0, 2])).tolist() == [3, 0, 4, 2, 1]


@pytest.mark.parametrize("num_entries", [FEW_ENTRIES - 1, FEW_ENTRIES, FEW_ENTRIES + 1])
def test_few_entries_are_ordered_inverted_and_counted_as_many_are(num_entries: int) -> None:
    groups = torch.randint(5, (num_entries,), generator=torch.Generator().manual_seed(num_entries))
    order = order_by_group(groups, num_groups=5)
    assert torch.equal(order, torch.argsort(groups, stable=True))
    assert torch.equal(order[inverse_permutation(order)], torch.arange(num_entries))
    assert count_per_expert(groups, num_experts=5) == tuple((groups == group).sum().item() for group in range(5))


def test_an_expert_that_there_is_not_is_counted_beside_the_others_or_refused() -> None:
    assert count_per_expert(torch.tensor([0, 3]), num_experts=2) == (1, 0, 0, 1)
    with pytest.raises(RuntimeError, match="negative"):
        count_per_expert(torch.tensor([0, -1]), num_experts=2)


@pytest.mark.parametrize(
    ("order", "expected"), [(None, [0, 0, 1, 0, 1]), (torch.tensor([4, 3, 2, 1, 0]), [1, 1, 0, 0, 0])]
)
def test_places_are_counted_within_a_group_in_the_order_of_service(order: Tensor | None, expected: list[int]) -> None:
    assert positions_in_group(GROUPS, order=order, sizes=torch.tensor([2, 1, 2])).tolist() == expected
