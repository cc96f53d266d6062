"""The random numbers of the runtime, in whole numbers of Python."""

from __future__ import annotations

_MODULUS = 1 << 64


def splitmix64(seed: int, rank: int) -> int:
    """The draw of a choice, as a signed 64-bit number (https://prng.di.unimi.it/splitmix64.c)."""
    bits = (seed + (rank + 1) * 0x9E3779B97F4A7C15) % _MODULUS
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % _MODULUS
    bits ^= bits >> 31
    return bits - _MODULUS if bits >= _MODULUS >> 1 else bits


def uniform(seed: int, choice: int, *, stream: int) -> float:
    """A draw from [0, 1): the upper 53 bits."""
    return (splitmix64(splitmix64(seed, stream), choice) % _MODULUS >> 11) / (1 << 53)
