"""Suite `scale`: what more experts and more actors cost the router, beside the smallest layout in the same run."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.bench.deployment import deploy, layer_config, library_layer, ray_cluster
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, interleave
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import spread_evenly, tokens_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_runtime.bench.deployment import Deployment
    from moe_runtime.bench.library import LibraryLayer
    from moe_runtime.bench.suite import BenchSettings

_SMALLEST = (8, 2)
_LAYOUTS = ((16, 4), (32, 4), (32, 8), (64, 8), (64, 16), (128, 16))
_QUICK_LAYOUTS = ((16, 4),)
_SIZES = (16, 256)


def _run(settings: BenchSettings) -> Iterator[Row]:
    layouts = _QUICK_LAYOUTS if settings.quick else _LAYOUTS
    starting = settings.begin("Starting 8 experts on 2 actors")
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_cluster())
        config = _config(*_SMALLEST, name="smallest")
        smallest = stack.enter_context(deploy(config, on_progress=starting.update))
        for num_experts, num_actors in layouts:
            title = f"{num_experts} experts on {num_actors} actors"
            starting = settings.begin(f"Starting {title}")
            config = _config(num_experts, num_actors, name="larger")
            with deploy(config, on_progress=starting.update) as deployment:
                measuring = settings.begin(f"Routing through {title}")
                for num_done, num_tokens in enumerate(_SIZES, start=1):
                    yield _measure(num_tokens, deployment, smallest, settings=settings)
                    measuring.update(num_done, len(_SIZES))


def _config(num_experts: int, num_actors: int, *, name: str) -> dict[str, object]:
    config = layer_config(num_experts=num_experts, experts_per_actor=num_experts // num_actors)
    return {**config, "name": f"{config['name']}-{name}"}


def _measure(num_tokens: int, deployment: Deployment, smallest: Deployment, *, settings: BenchSettings) -> Row:
    with library_layer(deployment) as ours, library_layer(smallest) as theirs:
        contenders = [_contender("ours", ours, num_tokens), _contender("smallest", theirs, num_tokens)]
        samples = interleave(contenders, effort=settings.effort)
        stats = ours.engine.stats
        messages_per_batch = stats.num_messages / sum(layer.totals.num_batches for layer in stats.layers.values())
        experts = len(deployment.recipe.experts)
        pids = deployment.host_pids
        memory_mb = sum(_memory_mb(pid) for pid in pids) / len(pids)
    return Row(
        "scale",
        {"tokens": num_tokens, "experts": experts, "actors": len(pids)},
        f"{_SMALLEST[0]} experts, {_SMALLEST[1]} actors",
        samples["ours"],
        samples["smallest"],
        {
            "messages_per_batch": messages_per_batch,
            "tokens_and_hosts_ratio": (num_tokens + len(pids)) / (num_tokens + _SMALLEST[1]),
            "memory_mb_per_actor": memory_mb,
            "start_s": deployment.start_s,
        },
    )


def _contender(name: str, library: LibraryLayer, num_tokens: int) -> Contender:
    choices = spread_evenly(num_tokens, num_experts=library.layer.num_experts)
    tokens = tokens_for(library.gate_weight, choices)
    return Contender(name, lambda num_calls: _router_seconds(library, tokens, num_calls))


def _router_seconds(library: LibraryLayer, tokens: Tensor, num_calls: int) -> list[float]:
    """Processor seconds that the router's thread spends on each of some batches: waiting is not its time."""
    times = []
    for _ in range(num_calls):
        started = time.thread_time()
        library.forward(tokens)
        times.append(time.thread_time() - started)
    return times


def _memory_mb(pid: int) -> float:
    """Memory of a process in which pages shared with others count in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


SCALE = Suite("scale", "8 to 128 no-op experts on 2 to 16 actors: the router's processor time per batch", _run)
