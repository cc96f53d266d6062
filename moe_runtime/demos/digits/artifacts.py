"""The trained layer as files: weights with a manifest of hashes, and the configuration that serves them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.cache_folder import cache_folder
from moe_runtime.demos.digits.training import DigitsLayer
from moe_runtime.errors import WeightsError
from moe_runtime.experts.golden_probe import golden_probe
from moe_runtime.experts.protocol import Expert
from moe_runtime.experts.weights import load_into, load_weights, save_weights, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from moe_runtime.demos.digits.recipe import Recipe

CONFIG_NAME = "config.yaml"
GATE_NAME = "gate.safetensors"


def folder_of(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the recipe's layer is kept, in the cache folder."""
    return cache_folder(environ) / f"digits-{recipe.key}"


def save(layer: DigitsLayer, recipe: Recipe, folder: Path) -> None:
    """Write one weight file per expert, the gate's, the manifest and the configuration.

    The folder appears whole or not at all; one that is there is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = workplace / "new"
        new.mkdir()
        for name, module in _modules(layer).items():
            probe = golden_probe(module, module.contract) if isinstance(module, Expert) else None
            save_weights(new / name, module.state_dict(), {"recipe": recipe.key}, probe=probe)
        (new / CONFIG_NAME).write_text(recipe.config_text)
        write_manifest(new)
        if folder.exists():
            # Out of the way first: a folder cannot be renamed onto one that has files in it.
            folder.rename(workplace / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def load(recipe: Recipe, folder: Path) -> DigitsLayer:
    """The saved layer, in eval mode, after its hashes were checked.

    Raises:
        WeightsError: If a file is missing, corrupt or does not fit, or the configuration is not the recipe's.
    """
    try:
        config_text = (folder / CONFIG_NAME).read_text()
    except OSError as exc:
        raise WeightsError(f"{folder / CONFIG_NAME}: expected the saved configuration, found: {exc}") from exc
    if config_text != recipe.config_text:
        raise WeightsError(f"{folder / CONFIG_NAME}: expected the recipe's configuration, found another text")
    layer = DigitsLayer(recipe)
    for name, module in _modules(layer).items():
        load_into(module, load_weights(folder / name).tensors)
    return layer.eval()


def _modules(layer: DigitsLayer) -> dict[str, nn.Module]:
    """Every part that has weights, by its file's name."""
    experts = {f"{name}.safetensors": expert for name, expert in zip(layer.names, layer.experts, strict=True)}
    return {GATE_NAME: layer.gate, **experts}
