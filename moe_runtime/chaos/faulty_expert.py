"""A feed-forward expert that misbehaves on demand: a row's first element asks for it.

No installation has this kind: ``armed`` registers it for one chaos run, in the processes of that run only.
"""

from __future__ import annotations

import os
import threading
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts.kinds.feed_forward import FeedForward, FeedForwardOptions
from moe_runtime.experts.protocol import ExpertKind

if TYPE_CHECKING:
    from torch import Tensor

KIND_NAME = "chaos_faulty"


class Poison(StrEnum):
    """What a row can do to the expert that it reaches."""

    RAISE = "raise"
    NAN = "nan"
    SLOW = "slow"
    EXIT = "exit"
    HANG = "hang"


#: First elements that ask for it. Exact in float32, and out of reach of the rows that clients draw.
MAGIC: dict[Poison, float] = {
    Poison.RAISE: 77.125,
    Poison.NAN: 77.25,
    Poison.SLOW: 77.375,
    Poison.EXIT: 77.5,
    Poison.HANG: 77.625,
}


#: Sleep before a slow row is computed.
SLOW_S = 0.3


class FaultyOptions(StrictModel):
    """A feed-forward expert, and how long it sleeps when it is asked to."""

    hidden_features: int = Field(64, ge=1, description="Width of the hidden layer.")
    slow_s: float = Field(SLOW_S, gt=0, description="Sleep before a slow row is computed.")
    hang_s: float = Field(3600.0, gt=0, description="Sleep that stands for hanging forever.")


class FaultyExpert(nn.Module):
    """``feed_forward``, unless a row's first element is one of ``MAGIC``."""

    def __init__(self, in_shape: tuple[int, ...], options: FaultyOptions) -> None:
        super().__init__()
        self.feed_forward = FeedForward(in_shape, FeedForwardOptions(hidden_features=options.hidden_features))
        self.contract = self.feed_forward.contract
        self._options = options
        self._never = threading.Event()

    def forward(self, rows: Tensor) -> Tensor:
        """``(num_rows, in_features)`` to the same shape.

        Raises:
            RuntimeError: If a row asks for it.
        """
        first = rows[:, 0]
        if bool((first < min(MAGIC.values())).all()):
            return self._compute(rows)
        if bool((first == MAGIC[Poison.EXIT]).any()):
            os._exit(66)
        if bool((first == MAGIC[Poison.HANG]).any()):
            self._never.wait(self._options.hang_s)
        if bool((first == MAGIC[Poison.RAISE]).any()):
            raise RuntimeError("a row asked this expert to raise")
        if bool((first == MAGIC[Poison.SLOW]).any()):
            self._never.wait(self._options.slow_s)
        is_spoiled = (first == MAGIC[Poison.NAN]).unsqueeze(1)
        return torch.where(is_spoiled, torch.nan, self._compute(rows))

    def _compute(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.feed_forward(rows)
        return outputs


KIND = ExpertKind(KIND_NAME, FaultyOptions, FaultyExpert)
