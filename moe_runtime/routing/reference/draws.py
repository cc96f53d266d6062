"""Draws of the oracle: hashes of a row's seed and a choice, one number at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.routing.reference.choices import RoutingInputs

_MODULUS = 1 << 64


def row_seed(inputs: RoutingInputs, token: int) -> int:
    """The seed of a token's draws; its index where it has none."""
    return token if inputs.row_seeds is None else inputs.row_seeds[token]


def signed_draw(seed: int, rank: int) -> int:
    """The draw of a choice, as a signed 64-bit number (https://prng.di.unimi.it/splitmix64.c)."""
    bits = _splitmix64(seed, rank)
    return bits - _MODULUS if bits >= _MODULUS >> 1 else bits


def uniform_draw(seed: int, choice: int, *, stream: int) -> float:
    """The draw of a choice in [0, 1): 53 bits of its hash, keyed by the hash of the stream."""
    return (_splitmix64(_splitmix64(seed, stream), choice) >> 11) / (1 << 53)


def _splitmix64(seed: int, rank: int) -> int:
    bits = (seed + (rank + 1) * 0x9E3779B97F4A7C15) % _MODULUS
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % _MODULUS
    return bits ^ (bits >> 31)
