"""Which layers of a runtime are experts of which others, and what is wrong with that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.experts.suggestions import did_you_mean
from moe_runtime.launch.expansion import blocks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.models import LayerConfig

#: The kind of an expert that is another layer of its runtime.
MOE_KIND = "moe"
#: The kind of an expert that is a layer of another runtime.
REMOTE_KIND = "remote"


@dataclass(frozen=True)
class Nesting:
    """The layers of a configuration, sorted.

    Attributes:
        innermost_first: Names of all layers, each after those that are its experts.
        levels: 0 for a layer that is no expert of another; else one more than the largest of those whose it is.
        mistakes: One line each: layers that there are not, and layers that contain themselves.
    """

    innermost_first: tuple[str, ...]
    levels: Mapping[str, int]
    mistakes: tuple[str, ...]


def sort_layers(layers: Mapping[str, LayerConfig]) -> Nesting:
    """How the layers of a configuration are nested; where they contain themselves, the order says nothing of those."""
    walk = _Walk({name: _inner_layers(name, layer) for name, layer in layers.items()})
    for name in layers:
        walk.visit(name, path=())
    levels = dict.fromkeys(layers, 0)
    if not walk.mistakes:
        for outer in reversed(walk.done):
            for inner in walk.links[outer].values():
                levels[inner] = max(levels[inner], levels[outer] + 1)
    return Nesting(tuple(walk.done), levels, tuple(walk.mistakes))


def _inner_layers(name: str, layer: LayerConfig) -> dict[str, str]:
    """The layers that are experts of one, by the path of the key that says so; options are not checked yet."""
    named = {
        f"layers.{name}.{key}.options.layer": block.options.get("layer")
        for key, block in blocks_of(layer)
        if block.kind == MOE_KIND
    }
    return {key: inner for key, inner in named.items() if isinstance(inner, str)}


@dataclass
class _Walk:
    """A walk from each layer to its inner ones, depth first."""

    links: dict[str, dict[str, str]]
    done: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def visit(self, name: str, *, path: tuple[str, ...]) -> None:
        if name in self.done:
            return
        for key, inner in self.links[name].items():
            here = (*path, name)
            if inner not in self.links:
                hint = did_you_mean(inner, self.links)
                self.mistakes.append(f"{key}: expected a layer of this runtime, found {inner!r}; {hint}")
            elif inner in here:
                cycle = " -> ".join((*here[here.index(inner) :], inner))
                self.mistakes.append(f"{key}: expected a layer that does not contain this one, found the cycle {cycle}")
            else:
                self.visit(inner, path=here)
        self.done.append(name)
