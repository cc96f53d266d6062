"""Every policy end to end: train or load, serve on Ray, roll from policy to policy, hold each against the dense one."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.data import load_digits
from moe_runtime.demos.digits.recipe import DEFAULT_RECIPE
from moe_runtime.demos.digits.trained import check_installed, check_writable, trained_layer
from moe_runtime.demos.routers.policies import POLICIES, TrainedGate
from moe_runtime.demos.routers.render import show_result, show_title
from moe_runtime.demos.routers.result import BASELINE, RoutersResult
from moe_runtime.demos.routers.serving import answers, prepare
from moe_runtime.demos.routers.summary import Truth, summarise
from moe_runtime.progress import make_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress

    from moe_runtime.demos.digits.data import DigitsData
    from moe_runtime.demos.digits.recipe import Recipe
    from moe_runtime.demos.digits.trained import TrainedLayer
    from moe_runtime.demos.routers.policies import DemoPolicy
    from moe_runtime.demos.routers.serving import Answer


def run(
    *,
    json_path: Path | None = None,
    fresh: bool = False,
    console: Console,
    recipe: Recipe = DEFAULT_RECIPE,
    policies: Sequence[DemoPolicy] = POLICIES,
    ray: bool = True,
) -> RoutersResult:
    """Send the same images through every policy, over one pool of trained experts on Ray, and show how each did.

    The experts' actors are started once; the runtime is upgraded from policy to policy.

    Args:
        json_path: Where to write the result as well, as JSON; its folder must be there.
        fresh: Train anew even if the cache has the layer, which is that of ``demo digits``.
        console: Where to print.
        recipe: What to train.
        policies: Which, the dense one first.
        ray: Whether experts and router are Ray actors; otherwise they are threads of this process.

    Raises:
        DemoError: If something that it needs is not installed or not writable; or if answers are not what the
            experts come to, after the result is shown and written.
        MoERuntimeError: If the runtime does not start or roll, or a request ends with an error.
    """
    check_installed(recipe)
    check_writable(artifacts.folder_of(recipe), json_path)
    show_title(console)
    started = time.perf_counter()
    data = load_digits(seed=recipe.seed, held_out_share=recipe.held_out_share)
    with make_progress(console) as progress:
        trained = trained_layer(recipe, data.training, fresh=fresh, progress=progress)
        result = _route(trained, data, policies, recipe=recipe, ray=ray, progress=progress)
    result = replace(result, seconds=time.perf_counter() - started)
    show_result(console, result)
    if json_path is not None:
        result.write_json(json_path)
    result.check()
    return result


def _route(
    trained: TrainedLayer,
    data: DigitsData,
    policies: Sequence[DemoPolicy],
    *,
    recipe: Recipe,
    ray: bool,
    progress: Progress,
) -> RoutersResult:
    pixels = data.held_out.pixels
    with torch.inference_mode():
        gate = TrainedGate(trained.layer.gate.state_dict()["weight"], data.training.pixels)
        truth = Truth(data.held_out.digits, trained.layer.expert_logits(pixels))
    starting = progress.add_task("Starting actors", total=None, note="")
    routing = progress.add_task("Rolling through policies", total=len(policies), note="", start=False)

    def on_start(num_ready: int, num_actors: int) -> None:
        progress.update(starting, total=num_actors, completed=num_ready, note=f"{num_ready} of {num_actors} ready")

    found: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="moe-routers-") as folder:
        served = prepare(policies, gate, recipe=recipe, experts=trained.folder, folder=Path(folder))
        for answer in answers(served, pixels, logits=gate.logits(pixels), ray=ray, on_start=on_start):
            found.append(answer)
            progress.start_task(routing)
            progress.update(routing, advance=1, note=answer.policy.name)
    return _result(found, trained, truth=truth)


def _result(found: Sequence[Answer], trained: TrainedLayer, *, truth: Truth) -> RoutersResult:
    (dense,) = (answer.result.outputs for answer in found if answer.policy.name == BASELINE)
    (pids,) = {answer.pids for answer in found}
    return RoutersResult(
        policies=tuple(summarise(answer, dense=dense, truth=truth) for answer in found),
        experts=tuple(trained.layer.names),
        num_images=len(truth.digits),
        pids=pids,
        training_s=trained.training_s,
        seconds=0.0,
    )
