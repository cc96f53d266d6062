"""The main job end to end: train or load, serve on Ray, call over gRPC, check against one process, report."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.data import load_digits
from moe_runtime.demos.digits.recipe import DEFAULT_RECIPE, LAYER
from moe_runtime.demos.digits.reference import Reference
from moe_runtime.demos.digits.render import show_result, show_title
from moe_runtime.demos.digits.summary import Preparation, served_experts, summarise
from moe_runtime.demos.digits.traffic import DEFAULT_LOAD, send
from moe_runtime.demos.digits.trained import check_installed, check_writable, trained_layer
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
    from moe_runtime.demos.digits.trained import TrainedLayer

# Any port: the configuration's own may be taken, by this demo in another shell for instance.
_ADDRESS = "127.0.0.1:0"


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
    check_installed(recipe)
    check_writable(artifacts.folder_of(recipe), json_path)
    show_title(console)
    data = load_digits(seed=recipe.seed, held_out_share=recipe.held_out_share)
    with make_progress(console) as progress:
        trained = trained_layer(recipe, data.training, fresh=fresh, progress=progress)
        result = _serve_and_call(trained, data, load, ray=ray, progress=progress)
    show_result(console, result, address=recipe.config.router.address)
    if json_path is not None:
        result.write_json(json_path)
    result.check()
    return result


def _serve_and_call(
    trained: TrainedLayer, data: DigitsData, load: Load, *, ray: bool, progress: Progress
) -> DigitsResult:
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
