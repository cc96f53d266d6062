"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'conv'? Known: conv, ..."``, without the question where nothing is near."""
    names = sorted(known)
    listing = f"known: {', '.join(names)}" if names else "there are none"
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}? ({listing})" if near else listing
