"""The trained layer, from the cache or anew, and what must be there before that takes time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.training import train
from moe_runtime.demos.errors import DemoError
from moe_runtime.errors import PlugInError, WeightsError
from moe_runtime.experts.registry import check_plug_ins

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from moe_runtime.demos.digits.data import Images
    from moe_runtime.demos.digits.recipe import Recipe
    from moe_runtime.demos.digits.training import DigitsLayer


@dataclass(frozen=True)
class TrainedLayer:
    """The layer as it lies in its folder, and how long training took if it took place."""

    layer: DigitsLayer
    folder: Path
    training_s: float | None


def check_installed(recipe: Recipe) -> None:
    """Find out whether the recipe's plug-ins are there.

    Raises:
        DemoError: If one is not; the message says how to install it.
    """
    try:
        check_plug_ins(recipe.config.plug_ins)
    except PlugInError as exc:
        raise DemoError(
            f"{exc}\nits fifth expert is the example plug-in: pip install ./examples/custom_expert"
        ) from exc


def check_writable(folder: Path, json_path: Path | None) -> None:
    """Find out before anything takes time, not after.

    Raises:
        DemoError: If the cache's folder or the one of ``json_path`` cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(f"no permission to write to {folder.parent}")
    except OSError as exc:
        raise DemoError(f"the trained layer cannot be kept: {exc}; set MOE_RUNTIME_CACHE to another folder") from exc
    if json_path is not None and not json_path.parent.is_dir():
        raise DemoError(f"--json {json_path}: expected an existing folder, found none at {json_path.parent}")


def trained_layer(recipe: Recipe, images: Images, *, fresh: bool, progress: Progress) -> TrainedLayer:
    """The recipe's layer from the cache; trained and put there first if need be.

    Args:
        recipe: What to train.
        images: The training images.
        fresh: Train anew even if the cache has it.
        progress: Shows how far training is.
    """
    folder = artifacts.folder_of(recipe)
    task = progress.add_task("Training gate and experts", total=recipe.num_epochs, note=f"{len(images):,} images")
    if folder.exists() and not fresh:
        try:
            layer = artifacts.load(recipe, folder)
        except WeightsError as exc:
            progress.console.print(f"The saved layer cannot be used and is trained again: {exc}", markup=False)
        else:
            progress.update(task, completed=recipe.num_epochs, note="done before")
            return TrainedLayer(layer, folder, training_s=None)
    started = time.perf_counter()
    trained = train(recipe, images, on_epoch=lambda num_done: progress.update(task, completed=num_done))
    artifacts.save(trained, recipe, folder)
    return TrainedLayer(artifacts.load(recipe, folder), folder, training_s=time.perf_counter() - started)
