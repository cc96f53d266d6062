"""The imbalance shapes W0 to W7: which expert each token of each request wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_MOVES_EVERY = 100


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        name: ``W0`` and so on.
        title: In words.
        shares: Share of the tokens per expert, for the request of that number.
        burst: Requests that are sent at once instead of by a steady number of callers; 1 is steady.
    """

    name: str
    title: str
    shares: Callable[[int, int], Tensor]
    burst: int = 1

    def choices(self, request: int, *, num_tokens: int, num_experts: int) -> Tensor:
        """The experts of a request's tokens, int64 ``(num_tokens, 1)``."""
        generator = torch.Generator().manual_seed(request)
        shares = self.shares(request, num_experts)
        return torch.multinomial(shares, num_tokens, replacement=True, generator=generator).unsqueeze(1)


def _uniform(_: int, num_experts: int) -> Tensor:
    return torch.full((num_experts,), 1.0 / num_experts)


def _hot(shares: dict[int, float], num_experts: int) -> Tensor:
    """The given experts' shares; the others split the rest."""
    rest = (1.0 - sum(shares.values())) / (num_experts - len(shares))
    result = torch.full((num_experts,), rest)
    result[list(shares)] = torch.tensor(list(shares.values()))
    return result


def _zipf(exponent: float, num_experts: int) -> Tensor:
    weights = torch.arange(1, num_experts + 1, dtype=torch.float32) ** -exponent
    return weights / weights.sum()


SHAPES = (
    Shape("W0", "uniform", _uniform),
    Shape("W1", "one hot expert takes half", lambda _, n: _hot({0: 0.5}, n)),
    Shape("W2", "Zipf(1.0)", lambda _, n: _zipf(1.0, n)),
    Shape("W3", "Zipf(1.5)", lambda _, n: _zipf(1.5, n)),
    Shape("W4", "two hot experts on one host", lambda _, n: _hot({0: 0.35, 1: 0.35}, n)),
    Shape("W5", "the hot expert moves every 100 requests", lambda i, n: _hot({i // _MOVES_EVERY % n: 0.5}, n)),
    Shape("W6", "bursts of 16 times the load", _uniform, burst=16),
    Shape("W7", "all tokens to one expert", lambda _, n: _hot({0: 1.0}, n)),
)
