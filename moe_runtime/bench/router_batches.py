"""Batches of an imbalance shape, as router logits and as whatever else a policy reads of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.policy import TokenInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_runtime.bench.shapes import Shape

NUM_TOKENS = 4096
#: Requests of a shape whose batches are looked at: the hot expert of W5 has moved on from one to the other.
REQUESTS = (0, 100)
# Ids of tokens are as skewed as experts are: a hot word takes the place of a hot expert where words choose experts.
_VOCABULARY = 32_768
_SMALLEST_SHARE = 1e-9


@dataclass(frozen=True)
class RouterBatch:
    """The tokens of one batch, as routers know them.

    Attributes:
        logits: Of all experts, float32 ``(num_tokens, num_experts)``.
        info: Ids, rows and seeds.
    """

    logits: Tensor
    info: TokenInfo


def batches(shape: Shape, *, num_experts: int) -> Iterator[RouterBatch]:
    """Some batches of a shape; where load is bursty, those of a burst and those between bursts."""
    for request in REQUESTS:
        for num_tokens in dict.fromkeys((NUM_TOKENS, NUM_TOKENS // shape.burst)):
            yield make_batch(shape, request, num_tokens=num_tokens, num_experts=num_experts)


def make_batch(shape: Shape, request: int, *, num_tokens: int = NUM_TOKENS, num_experts: int) -> RouterBatch:
    """A batch whose first choices follow the shape: logits are log shares plus Gumbel noise.

    The softmax of such logits is sharp, as a trained gate's is; second choices follow the shape among the experts
    that are left.
    """
    generator = torch.Generator().manual_seed(1_000_003 * request + num_tokens)
    noise = -torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()
    logits = shape.shares(request, num_experts).clamp_min(_SMALLEST_SHARE).log() + noise
    words = torch.multinomial(shape.shares(request, _VOCABULARY), num_tokens, replacement=True, generator=generator)
    seeds = torch.randint(2**62, (num_tokens,), generator=generator)
    return RouterBatch(logits, TokenInfo(row_seeds=seeds, row_ids=torch.arange(num_tokens), token_ids=words))
