"""Views: which part of a row an expert sees, and in which shape."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.experts import ViewConfig
from moe_runtime.errors import ConfigError
from moe_runtime.experts.view import resolve_view


def test_no_view_shows_the_whole_item_in_its_own_shape() -> None:
    view = resolve_view((2, 3), None)
    rows = torch.arange(12.0).reshape(2, 2, 3)
    assert view.shape == (2, 3)
    assert torch.equal(view.apply(rows), rows)


def test_empty_view_flattens_the_item() -> None:
    view = resolve_view((2, 3), ViewConfig())
    assert view.shape == (6,)
    assert view.apply(torch.zeros(4, 2, 3)).shape == (4, 6)


def test_shape_folds_the_row_in_row_major_order() -> None:
    view = resolve_view((4,), ViewConfig(shape=[1, 2, 2]))
    seen = view.apply(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert torch.equal(seen, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))


def test_columns_count_in_the_flattened_item_and_exclude_the_end() -> None:
    view = resolve_view((2, 3), ViewConfig(columns=(2, 5)))
    seen = view.apply(torch.arange(6.0).reshape(1, 2, 3))
    assert torch.equal(seen, torch.tensor([[2.0, 3.0, 4.0]]))


def test_columns_can_be_folded_too() -> None:
    view = resolve_view((6,), ViewConfig(columns=(2, 6), shape=[2, 2]))
    seen = view.apply(torch.arange(6.0).reshape(1, 6))
    assert torch.equal(seen, torch.tensor([[[2.0, 3.0], [4.0, 5.0]]]))


def test_view_of_no_rows_keeps_the_row_shape() -> None:
    assert resolve_view((6,), ViewConfig(columns=(2, 6), shape=[2, 2])).apply(torch.zeros(0, 6)).shape == (0, 2, 2)


def test_whole_view_copies_nothing() -> None:
    rows = torch.zeros(2, 4)
    assert resolve_view((4,), ViewConfig(shape=[2, 2])).apply(rows).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize(
    ("view", "is_whole"),
    [
        (None, True),
        (ViewConfig(shape=[4]), True),
        (ViewConfig(shape=[2, 2]), False),
        (ViewConfig(columns=(0, 4)), False),
    ],
)
def test_only_a_view_that_changes_nothing_is_the_whole_item(view: ViewConfig | None, is_whole: bool) -> None:
    assert resolve_view((4,), view).is_whole_item is is_whole


@pytest.mark.parametrize("columns", [(0, 7), (6, 8)])
def test_columns_outside_the_item_are_refused(columns: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"view\.columns: expected \[start, stop\].* <= 6 .*found \[") as caught:
        resolve_view((2, 3), ViewConfig(columns=columns))
    assert str(list(columns)) in str(caught.value)


@pytest.mark.parametrize("shape", [[7], [2, 2], [-2, -3], [0], []])
def test_shape_of_another_size_is_refused(shape: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"view\.shape: expected positive sizes with a product of 6"):
        resolve_view((2, 3), ViewConfig(shape=shape))


def test_shape_is_compared_with_the_columns_it_folds() -> None:
    with pytest.raises(ConfigError, match="product of 2, found"):
        resolve_view((6,), ViewConfig(columns=(0, 2), shape=[6]))
