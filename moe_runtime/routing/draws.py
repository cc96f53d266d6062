"""Random numbers without a generator: each is a function of a row's key and a choice, the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# splitmix64 (https://prng.di.unimi.it/splitmix64.c), as signed numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)


def uniform_draws(row_seeds: Tensor, choice: Tensor | int, *, stream: int) -> Tensor:
    """Numbers drawn uniformly from [0, 1), in multiples of 2**-53.

    Args:
        row_seeds: Keys, int64, any shape.
        choice: Which draw of each key, 0 for the first: one number, or int64 that broadcasts against the keys.
        stream: Draws of different streams are independent; one number per use.

    Returns:
        float64 in the broadcast shape.
    """
    # The keys are mixed before the choice counts: keys a multiple of splitmix's increment apart share no draws then.
    streams = torch.as_tensor(stream, device=row_seeds.device)
    bits = hash_choices(
        hash_choices(row_seeds, streams), torch.as_tensor(choice, dtype=torch.int64, device=row_seeds.device)
    )
    return _shift_right(bits, 11).double() * 2.0**-53


def hash_choices(seeds: Tensor, ranks: Tensor) -> Tensor:
    """A well-mixed number for each (seed, choice), the same on every device: splitmix64.

    Args:
        seeds: int64, any shape.
        ranks: Choices, 0 for the first, int64 that broadcasts against the seeds.

    Returns:
        int64 in the broadcast shape, over the whole signed range.
    """
    bits = seeds + (ranks + 1) * _INCREMENT
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST_FACTOR
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND_FACTOR
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # torch shifts signed numbers arithmetically; the mask clears the copies of the sign bit.
    return (bits >> count) & ((1 << (64 - count)) - 1)
