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
    if tuple(outputs.shape) != expected:
        return f"expected output of shape {list(expected)}, found {list(outputs.shape)}"
    if outputs.dtype != dtype:
        return f"expected output of dtype {dtype}, found {outputs.dtype}"
    return None


def num_spoiled_rows(outputs: torch.Tensor, inputs: torch.Tensor) -> int:
    """Number of rows with NaN or an infinity in the output although there is none in the input.

    A layer that allows non-finite input gets non-finite output for it; that is not the expert's doing.

    Args:
        outputs: ``(num_rows, *out_shape)``.
        inputs: ``(num_rows, *in_shape)``.
    """
    # A sum passes over the rows once and makes nothing; where it is finite, every element is.
    if math.isfinite(float(outputs.detach().sum())):
        return 0
    finite = torch.isfinite(outputs)
    return int((_rows_all(torch.isfinite(inputs)) & ~_rows_all(finite)).sum())


def _rows_all(flags: torch.Tensor) -> torch.Tensor:
    return flags.reshape(flags.shape[0], -1).all(dim=1)
