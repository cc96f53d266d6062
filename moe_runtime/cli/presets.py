"""``moe-runtime presets``: the systems of the literature that a layer's ``preset`` can name."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from moe_runtime.cli.preset_texts import capacity_text, losses_text, policy_text
from moe_runtime.config.yaml_file import as_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from moe_runtime.config.presets.preset import Preset


def print_table(presets: Iterable[Preset], *, console: Console) -> None:
    """Print one row for each preset."""
    names = (Column(name, no_wrap=True) for name in ("preset", "year"))
    texts = (Column(name, overflow="fold") for name in ("system", "policy", "capacity", "losses"))
    table = Table(*names, *texts, box=SIMPLE_HEAD)
    for each in presets:
        table.add_row(
            each.name,
            str(each.year),
            each.title,
            policy_text(each),
            capacity_text(each),
            losses_text(each),
        )
    console.print(table)
    console.print("moe-runtime presets NAME shows one; `preset: NAME` in a layer uses it.", markup=False)


def print_preset(preset: Preset, *, console: Console) -> None:
    """Print everything about one preset: what it is, its formula, its figures, and the keys that it stands for."""
    console.print(f"{preset.title} ({preset.year})", style="bold", markup=False)
    console.print(preset.source, markup=False, soft_wrap=True)
    for heading, text in (
        ("", preset.about),
        ("formula: ", preset.formula),
        ("figures: ", preset.figures),
        ("differs: ", preset.differs),
    ):
        console.print(f"\n{heading}{text}", markup=False)
    console.print(f"\npreset: {preset.name} in a layer stands for\n", markup=False)
    console.print(as_yaml(dict(preset.layer)).rstrip(), markup=False, soft_wrap=True)


def print_json(presets: Iterable[Preset], *, console: Console) -> None:
    """Print the presets as a JSON list."""
    console.print(json.dumps([dataclasses.asdict(each) for each in presets], indent=2), markup=False, soft_wrap=True)
