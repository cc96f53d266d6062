"""Checks that the built-in kinds make of the shape of their input."""

from __future__ import annotations

from moe_runtime.errors import ConfigError


def require_dims(kind: str, in_shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    """Check that an expert's input has the dimensions that its kind works on.

    Raises:
        ConfigError: If it has another number of dimensions.
    """
    if len(in_shape) != len(dims):
        raise ConfigError(
            f"kind {kind!r}: expected an input of shape ({', '.join(dims)}), found {list(in_shape)}; "
            f"`view: {{shape: [...]}}` gives the expert another shape"
        )
