"""The bias that balances experts without a loss: lower for the busy, higher for the idle (DeepSeek-V3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def bias_update(counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """What to add to each expert's selection bias after an optimiser step, before centring.

    ``rate * sign(mean(counts) - counts)`` (https://arxiv.org/abs/2408.15664, algorithm 1).

    Args:
        counts: Assignments that each expert was asked for, over all routers, ``(num_experts,)``.
        rate: Size of one step.

    Returns:
        float32 ``(num_experts,)``; 0 for an expert that is at the mean.
    """
    counts = counts.float()
    return rate * torch.sign(counts.mean() - counts)


def update_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """The bias after a step, with mean 0: ``(num_experts,)``; see ``bias_update``."""
    moved = bias + bias_update(counts, rate=rate)
    return moved - moved.mean()
