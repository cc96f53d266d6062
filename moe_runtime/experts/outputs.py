"""What makes an expert's answer acceptable."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe_runtime.experts.protocol import ExpertContract


def output_mistake(outputs: object, *, num_rows: int, contract: ExpertContract, dtype: torch.dtype) -> str | None:
    """What is wrong with an expert's output in number of rows, shape or dtype; None if nothing is."""
    if not isinstance(outputs, torch.Tensor):
        return f"expected a tensor as output, found {type(outputs).__name__}"
    expected = (num_rows, *contract.out_shape)
    if outputs.shape != expected:
        return f"expected output of shape {list(expected)}, found {list(outputs.shape)}"
    if outputs.dtype != dtype:
        return f"expected output of dtype {dtype}, found {outputs.dtype}"
    return None


def non_finite_rows(rows: torch.Tensor) -> torch.Tensor | None:
    """Which rows of a floating tensor hold NaN or an infinity, bool ``(num_rows,)``; None if none does."""
    # A sum passes over the rows once and makes nothing; where it is finite, every element is.
    if math.isfinite(rows.sum().item()):
        return None
    flags = ~torch.isfinite(rows).reshape(rows.shape[0], -1).all(dim=1)
    return flags if bool(flags.any()) else None


def spoiled_rows(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor | None:
    """Which rows hold NaN or an infinity in the output although there is none in the input; None if none does.

    A layer that allows non-finite input gets non-finite output for it; that is not the expert's doing.

    Args:
        outputs: ``(num_rows, *out_shape)``.
        inputs: ``(num_rows, *in_shape)``.

    Returns:
        bool ``(num_rows,)``, or None.
    """
    spoiled = non_finite_rows(outputs)
    if spoiled is None:
        return None
    given = non_finite_rows(inputs)
    if given is not None:
        spoiled &= ~given
    return spoiled if bool(spoiled.any()) else None
