"""All presets by name, and a layer's block with its preset put under it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_runtime.config.presets import (
    balanced_by_design,
    fine_grained,
    first_mixtures,
    open_models,
    scaled_transformers,
)
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.config.presets.preset import Preset

_MODULES = (first_mixtures, scaled_transformers, balanced_by_design, open_models, fine_grained)
_MAX_SUGGESTIONS = 3

#: Every preset by its name, the oldest first.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in sorted((each for module in _MODULES for each in module.PRESETS), key=lambda preset: preset.year)
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: If there is none; the message suggests the nearest.
    """
    preset = PRESETS.get(name)
    if preset is None:
        near = difflib.get_close_matches(name, PRESETS, n=_MAX_SUGGESTIONS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(PRESETS)}"
        raise ConfigError(f"preset: there is no {name!r}; {hint}")
    return preset


def with_preset(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer's block with what its preset says put under it; the block itself where it names none.

    The layer's own keys win. A block within it is merged with the preset's key by key, unless it names another
    ``kind``: then it replaces the preset's. Lists are replaced.

    Raises:
        ConfigError: If no preset has the name.
    """
    name = layer.get("preset")
    if not isinstance(name, str):
        return layer
    return _over(layer, find_preset(name).layer)


def _over(own: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(below))
    for key, value in own.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping) and _same_kind(value, under):
            merged[key] = _over(value, under)
        else:
            merged[key] = value
    return merged


def _same_kind(own: Mapping[str, Any], below: Mapping[str, Any]) -> bool:
    return "kind" not in own or own["kind"] == below.get("kind")
