"""Numbers drawn by a seed."""

from __future__ import annotations

import torch


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Normally distributed, float64: what is a tie in one of two computations must be one in the other."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
