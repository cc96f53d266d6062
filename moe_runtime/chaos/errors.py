"""What a chaos run raises on purpose."""

from __future__ import annotations

from moe_runtime.errors import MoERuntimeError


class ChaosError(MoERuntimeError):
    """A chaos run that cannot begin, or whose cluster broke a promise; the message says which."""
