"""The main job end to end: train or load, serve on Ray, call over gRPC, check against one process, report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.data import load_digits
from moe_runtime.demos.digits.recipe import DEFAULT_RECIPE, LAYER
from moe_runtime.demos.digits.reference import Reference
from moe_runtime.demos.digits.render import show_result, show_title
from moe_runtime.demos.digits.summary import Preparation, served_experts, summarise
from moe_runtime.demos.digits.traffic import DEFAULT_LOAD, send
from moe_runtime.demos.digits.training import train
from moe_runtime.demos.errors import DemoError
from moe_runtime.errors import PlugInError, WeightsError
from moe_runtime.experts.registry import check_plug_ins
from moe_runtime.launch.runtime import serve
from moe_runtime.progress import make_progress
from moe_runtime.rpc.client import MoEClient

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

    from moe_runtime.demos.digits.data import DigitsData, Images
    from moe_runtime.demos.digits.recipe import Recipe
    from moe_runtime.demos.digits.result import DigitsResult
    from moe_runtime.demos.digits.summary import ServedExpert
    from moe_runtime.demos.digits.traffic import Load, Traffic
    from moe_runtime.demos.digits.training import DigitsLayer

# Any port: the configuration's own may be taken, by this demo in another shell for instance.
_ADDRESS = "127.0.0.1:0"


@dataclass(frozen=True)
class _Trained:
    """The layer as it lies in its folder, and how long training took if it took place."""

    layer: DigitsLayer
    folder: Path
    training_s: float | None


def run(
    *,
    json_path: Path | None = None,
    fresh: bool = False,
    console: Console,
    recipe: Recipe = DEFAULT_RECIPE,
    load: Load = DEFAULT_LOAD,
    ray: bool = True,
) -> DigitsResult:
    """Classify held-out handwritten digits with five kinds of experts on Ray, and show how it went.

    Ends cleanly on ``KeyboardInterrupt``: nothing is left running, and no half-trained layer is kept.

    Args:
        json_path: Where to write the result as well, as JSON; its folder must be there.
        fresh: Train anew even if the cache has the layer.
        console: Where to print.
        recipe: What to train.
        load: What to send.
        ray: Whether experts and router are Ray actors; otherwise they are threads of this process.

    Raises:
        DemoError: If something that it needs is not installed or not writable; or if the answers are not as
            accurate, or not as near to the reference, as promised, after the result is shown and written.
        MoERuntimeError: If the runtime does not start, or a request ends with an error.
    """
    _check_installed(recipe)
    folder = artifacts.cache_folder(recipe)
    _check_writable(folder, json_path)
    show_title(console)
    data = load_digits(seed=recipe.seed, held_out_share=recipe.held_out_share)
    with make_progress(console) as progress:
        trained = _trained(recipe, data, folder, fresh=fresh, progress=progress)
        result = _serve_and_call(trained, data, load, ray=ray, progress=progress)
    show_result(console, result, address=recipe.config.router.address)
    if json_path is not None:
        result.write_json(json_path)
    result.check()
    return result


def _check_installed(recipe: Recipe) -> None:
    try:
        check_plug_ins(recipe.config.plug_ins)
    except PlugInError as exc:
        raise DemoError(
            f"{exc}\nits fifth expert is the example plug-in: pip install ./examples/custom_expert"
        ) from exc


def _check_writable(folder: Path, json_path: Path | None) -> None:
    """Find out before anything takes time, not after."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(f"no permission to write to {folder.parent}")
    except OSError as exc:
        raise DemoError(f"the trained layer cannot be kept: {exc}; set MOE_RUNTIME_CACHE to another folder") from exc
    if json_path is not None and not json_path.parent.is_dir():
        raise DemoError(f"--json {json_path}: expected an existing folder, found none at {json_path.parent}")


def _trained(recipe: Recipe, data: DigitsData, folder: Path, *, fresh: bool, progress: Progress) -> _Trained:
    """The layer from the cache; trained and put there first if need be."""
    note = f"{len(data.training):,} images"
    task = progress.add_task("Training gate and experts", total=recipe.num_epochs, note=note)
    if folder.exists() and not fresh:
        try:
            layer = artifacts.load(recipe, folder)
        except WeightsError as exc:
            progress.console.print(f"The saved layer cannot be used and is trained again: {exc}", markup=False)
        else:
            progress.update(task, completed=recipe.num_epochs, note="done before")
            return _Trained(layer, folder, training_s=None)
    started = time.perf_counter()
    trained = train(recipe, data.training, on_epoch=lambda num_done: progress.update(task, completed=num_done))
    artifacts.save(trained, recipe, folder)
    return _Trained(artifacts.load(recipe, folder), folder, training_s=time.perf_counter() - started)


def _serve_and_call(trained: _Trained, data: DigitsData, load: Load, *, ray: bool, progress: Progress) -> DigitsResult:
    config_path = trained.folder / artifacts.CONFIG_NAME
    reference = Reference(trained.layer, data.held_out)
    task = progress.add_task("Starting actors", total=None, note="")
    started = time.perf_counter()

    def on_progress(num_ready: int, num_actors: int) -> None:
        progress.update(task, total=num_actors, completed=num_ready, note=f"{num_ready} of {num_actors} ready")

    with serve(config_path, ray=ray, address=_ADDRESS, on_progress=on_progress) as runtime:
        preparation = Preparation(config_path, trained.training_s, starting_s=time.perf_counter() - started)
        with MoEClient(runtime.address) as client:
            traffic, experts = _call(client, data.held_out, load, progress=progress)
        stopping = progress.add_task("Stopping actors", total=None, note="")
    progress.update(stopping, total=1, completed=1)
    return summarise(traffic, load=load, reference=reference, experts=experts, preparation=preparation)


def _call(
    client: MoEClient, images: Images, load: Load, *, progress: Progress
) -> tuple[Traffic, tuple[ServedExpert, ...]]:
    """What the measured requests came to, and what the router says about the experts that served them."""
    # Connections are made and kernels chosen in a first round that does not count.
    send(client, images.pixels, layer=LAYER, load=replace(load, num_rounds=1))
    before = client.status()
    num_requests = load.num_rounds * load.concurrency
    task = progress.add_task("Classifying", total=num_requests, note=f"{num_requests:,} requests")
    traffic = send(client, images.pixels, layer=LAYER, load=load, on_answer=lambda: progress.advance(task))
    return traffic, served_experts(client.describe(), before=before, after=client.status())
