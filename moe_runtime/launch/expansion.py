"""A layer's expert blocks as single experts: ``count`` expanded, each with its name and weight file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.launch.recipes import ExpertRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.models import ExpertConfig, LayerConfig


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
    """The experts of a layer in the order of the gate's rows; names may still clash."""
    layer = loaded.config.layers[layer_name]
    taken = {name for block in layer.experts for name in _given_names(block)}
    experts: list[ExpandedExpert] = []
    for index, block in enumerate(layer.experts):
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
            key = f"layers.{layer_name}.experts.{index}"
            experts.append(ExpandedExpert(key, i == 0, ExpertRecipe(spec, block.resources, block.replicas)))
    return experts


def name_mistakes(layer_name: str, layer: LayerConfig) -> Iterator[str]:
    """One line per name that an earlier block of the layer has too."""
    owners: dict[str, int] = {}
    for index, block in enumerate(layer.experts):
        for name in _given_names(block):
            owner = owners.setdefault(name, index)
            if owner != index:
                yield (
                    f"layers.{layer_name}.experts.{index}.name: expected a name that no other expert of the layer "
                    f"has, found {name!r}, which experts.{owner} has"
                )


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
