"""The part of a token that one expert sees, and in which shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.experts import ViewConfig


@dataclass(frozen=True)
class View:
    """Takes full rows to what one expert sees; keeps no copy where the memory layout allows.

    Attributes:
        item_shape: Shape of a full row.
        columns: Half-open range of the flattened row's columns; None is all.
        shape: Shape of what the expert sees.
    """

    item_shape: tuple[int, ...]
    columns: tuple[int, int] | None
    shape: tuple[int, ...]

    @property
    def is_whole_item(self) -> bool:
        """Whether the expert sees full rows as they are."""
        return self.columns is None and self.shape == self.item_shape

    def apply(self, rows: Tensor) -> Tensor:
        """``(num_rows, *item_shape)`` to ``(num_rows, *shape)``."""
        if self.columns is not None:
            rows = rows.flatten(1)[:, self.columns[0] : self.columns[1]]
        return rows.reshape(rows.shape[0], *self.shape)


def resolve_view(item_shape: tuple[int, ...], view: ViewConfig | None) -> View:
    """The view of a config block onto items of one shape; the whole item where there is no block.

    Raises:
        ConfigError: If the columns lie outside the item, or the shape has another number of elements.
    """
    if view is None:
        return View(item_shape, None, item_shape)
    num_columns = prod(item_shape)
    if view.columns is not None:
        start, stop = view.columns
        if not 0 <= start < stop <= num_columns:
            raise ConfigError(
                f"view.columns: expected [start, stop] with 0 <= start < stop <= {num_columns} "
                f"(the item shape is {list(item_shape)}), found [{start}, {stop}]"
            )
        num_columns = stop - start
    shape = (num_columns,) if view.shape is None else tuple(view.shape)
    if any(size < 1 for size in shape) or prod(shape) != num_columns:
        raise ConfigError(
            f"view.shape: expected positive sizes with a product of {num_columns}, "
            f"found {list(shape)} with a product of {prod(shape)}"
        )
    return View(item_shape, view.columns, shape)
