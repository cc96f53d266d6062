"""What a preset is: a system of the literature, and the part of a layer's configuration that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One system.

    Attributes:
        name: What a layer's ``preset`` says.
        title: The system's own name.
        year: Of its first publication.
        source: Address of the paper, or of the release where there is none.
        about: What it is, in a sentence or two.
        formula: How a token ``x`` becomes ``y``; ``W`` is the gate's weight, ``f_i`` expert i, ``E`` their number.
        figures: Sizes and coefficients as published.
        differs: What other implementations do otherwise, and what this configuration cannot say.
        layer: Keys of a layer's block, as a configuration writes them; the token's shape is the user's.
    """

    name: str
    title: str
    year: int
    source: str
    about: str
    formula: str
    figures: str
    differs: str
    layer: Mapping[str, Any]
