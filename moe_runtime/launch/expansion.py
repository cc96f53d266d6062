"""A layer's expert blocks as single experts: ``count`` expanded, each with its name and weight file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.launch.recipes import ExpertRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_runtime.config.experts import ExpertConfig
    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.models import LayerConfig


@dataclass(frozen=True)
class ExpandedExpert:
    """One expert, and the place of its block in the configuration.

    Attributes:
        key: Path of its block, ``layers.digits.experts.0``.
        is_first: Whether it is the first of its block: the others have the same options and shapes.
        recipe: The expert.
    """

    key: str
    is_first: bool
    recipe: ExpertRecipe


def expand_experts(loaded: LoadedConfig, layer_name: str) -> list[ExpandedExpert]:
    """The experts of a layer in the order of the gate's rows, then the shared ones; names may still clash."""
    layer = loaded.config.layers[layer_name]
    taken = {name for _, block in blocks_of(layer) for name in _given_names(block)}
    experts: list[ExpandedExpert] = []
    for key, block in blocks_of(layer):
        for i, name in enumerate(_names(block, taken)):
            weights = None if block.weights is None else loaded.locate(block.weights.replace("{i}", str(i)))
            spec = ExpertSpec(
                layer=layer_name,
                expert_id=len(experts),
                name=name,
                kind=block.kind,
                item_shape=tuple(layer.item_shape),
                view=block.view,
                options=block.options,
                dtype=layer.dtype,
                weights=weights,
                seed=loaded.config.seed,
                exact=layer.exact,
                wire_dtype=layer.wire_dtype,
            )
            experts.append(
                ExpandedExpert(
                    f"layers.{layer_name}.{key}", i == 0, ExpertRecipe(spec, block.resources, block.replicas)
                )
            )
    return experts


def name_mistakes(layer_name: str, layer: LayerConfig) -> Iterator[str]:
    """One line per name that an earlier block of the layer has too."""
    owners: dict[str, str] = {}
    for key, block in blocks_of(layer):
        for name in _given_names(block):
            owner = owners.setdefault(name, key)
            if owner != key:
                yield (
                    f"layers.{layer_name}.{key}.name: expected a name that no other expert of the layer "
                    f"has, found {name!r}, which {owner} has"
                )


def blocks_of(layer: LayerConfig) -> Iterator[tuple[str, ExpertConfig]]:
    """Every block of experts with its key within the layer, ``experts.0``."""
    for key, blocks in (("experts", layer.experts), ("shared_experts", layer.shared_experts)):
        for index, block in enumerate(blocks):
            yield f"{key}.{index}", block


def _given_names(block: ExpertConfig) -> list[str]:
    if block.name is None:
        return []
    return [block.name] if block.count == 1 else [f"{block.name}-{i}" for i in range(block.count)]


def _names(block: ExpertConfig, taken: set[str]) -> list[str]:
    """The block's names; without one given, the next free ``<kind>-<n>``, which are taken from then on."""
    if block.name is not None:
        return _given_names(block)
    free = (name for n in itertools.count() if (name := f"{block.kind}-{n}") not in taken)
    names = list(itertools.islice(free, block.count))
    taken.update(names)
    return names
