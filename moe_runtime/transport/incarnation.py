"""Mints the number that tells one process at an address from every other that was or will be there."""

from __future__ import annotations

import secrets

INCARNATION_BITS = 64


def mint_incarnation() -> int:
    """A random number of 64 bits, never 0; each router and each expert host mints its own when it starts."""
    return 1 + secrets.randbelow(2**INCARNATION_BITS - 1)
