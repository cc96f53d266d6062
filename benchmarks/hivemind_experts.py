"""The experts that hivemind's server builds for the suite `peers`: the runtime's `feed_forward`, with its weights."""

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from hivemind.moe.server.layers import register_expert_class
from torch import nn

NEXT_EXPERT = itertools.count()


@register_expert_class("bench_feed_forward", lambda batch_size, hidden_dim: torch.empty((batch_size, hidden_dim)))
class BenchFeedForward(nn.Module):
    """`down(relu(up(x)))`; the n-th one that is built has the weights of expert n."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        weights = np.load(Path(os.environ["MOE_BENCH_EXPERTS"]) / f"{next(NEXT_EXPERT)}.npz")
        self.up, self.down = (nn.Linear(*weights[name].shape[::-1], bias=False) for name in ("up", "down"))
        for name in ("up", "down"):
            getattr(self, name).weight.data = torch.from_numpy(weights[name])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(num_rows, hidden_dim)` to the same shape."""
        return self.down(torch.relu(self.up(rows)))
