"""What ``moe-runtime validate`` prints of a configuration that can be served."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table

from moe_runtime.config.load import load_config, without_presets
from moe_runtime.config.yaml_file import as_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

    from moe_runtime.launch.recipes import ConfigSummary, LayerSummary


def print_summary(summary: ConfigSummary, *, config: Path, console: Console) -> None:
    """Print what the configuration would serve."""
    console.print(f"{config}: valid", style="green", markup=False, soft_wrap=True)
    table = Table("layer", "item shape", "output shape", "dtype", "policy", "experts", "actors")
    for layer in summary.layers:
        table.add_row(
            layer.name,
            shape_text(layer.item_shape),
            shape_text(layer.out_shape),
            layer.dtype,
            layer.policy,
            _experts_text(layer),
            _actors_text(layer),
        )
    console.print(table)
    routers = "1 router" if summary.num_routers == 1 else f"{summary.num_routers} routers"
    where = f", from {summary.address}" if summary.num_routers else ": programs use its layers as a library"
    console.print(f"{summary.name}: {routers}{where}", markup=False)
    if summary.unchecked_files:
        files = ", ".join(f"{key} {path}" for key, path in summary.unchecked_files.items())
        note = f"not checked, as they are not all on this machine: {files}; each router's node needs them"
        console.print(note, style="yellow", markup=False, soft_wrap=True)


def print_expanded(config: Path, *, console: Console) -> None:
    """Print the configuration as YAML that loads to the same one, with the keys of its presets written out."""
    plain = without_presets(load_config(config).config)
    console.print(as_yaml(plain).rstrip(), markup=False, soft_wrap=True)


def shape_text(shape: Iterable[int]) -> str:
    """A shape as the configuration writes it."""
    return "\\[" + ", ".join(map(str, shape)) + "]"


def _actors_text(layer: LayerSummary) -> str:
    shared = "" if layer.actor_group is None else f" of group {layer.actor_group}"
    return f"{layer.num_actors}{shared}"


def _experts_text(layer: LayerSummary) -> str:
    shared = f"; shared: {_kinds_text(layer.shared_experts.values())}" if layer.shared_experts else ""
    return _kinds_text(layer.experts.values()) + shared


def _kinds_text(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
