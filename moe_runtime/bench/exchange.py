"""Suite `exchange`: what the runtime adds to moving the bytes. No-op experts, so nothing is computed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.bare.actor_calls import actor_fleet
from moe_runtime.bench.bare.echo import echo_fleet
from moe_runtime.bench.deployment import deploy, layer_config, library_layer, ray_cluster
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, interleave, time_calls
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import spread_evenly, tokens_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_runtime.bench.bare.actor_calls import ActorFleet
    from moe_runtime.bench.bare.echo import EchoFleet
    from moe_runtime.bench.library import LibraryLayer
    from moe_runtime.bench.suite import BenchSettings

NUM_EXPERTS = 8
_SIZES = (1, 4, 16, 64, 256, 1024)
_QUICK_SIZES = (16, 256)
_ECHO, _ACTOR_CALLS = "zmq echo", "ray actor calls"
_TOLERANCE = 1e-5


def _run(settings: BenchSettings) -> Iterator[Row]:
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    starting = settings.begin("Starting 8 expert actors, 8 echo actors, 8 echo processes")
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(echo_fleet(NUM_EXPERTS))
        stack.enter_context(ray_cluster())
        deployment = stack.enter_context(deploy(layer_config(num_experts=NUM_EXPERTS), on_progress=starting.update))
        ours = stack.enter_context(library_layer(deployment))
        actors = stack.enter_context(actor_fleet(NUM_EXPERTS))
        measuring = settings.begin("Exchanging rows")
        for num_done, num_rows in enumerate(sizes, start=1):
            yield from _case(num_rows, ours=ours, actors=actors, echo=echo, settings=settings)
            measuring.update(num_done, len(sizes))


def _case(
    num_rows: int, *, ours: LibraryLayer, actors: ActorFleet, echo: EchoFleet, settings: BenchSettings
) -> Iterator[Row]:
    choices = spread_evenly(num_rows, num_experts=NUM_EXPERTS)
    tokens = tokens_for(ours.gate_weight, choices)
    _check(ours, tokens)
    parts = _parts(tokens, choices)
    samples = interleave(
        [
            Contender("ours", lambda n: time_calls(lambda: ours.forward(tokens), n)),
            Contender(_ECHO, lambda n: time_calls(lambda: echo.exchange(parts), n)),
            Contender(_ACTOR_CALLS, lambda n: time_calls(lambda: actors.exchange(parts), n)),
        ],
        effort=settings.effort,
    )
    for peer in (_ECHO, _ACTOR_CALLS):
        yield Row("exchange", {"rows": num_rows}, peer, samples["ours"], samples[peer])


def _check(ours: LibraryLayer, tokens: Tensor) -> None:
    """Identity experts whose weights sum to 1 give the tokens back."""
    outputs = ours.forward(tokens).outputs
    if not torch.allclose(outputs, tokens, atol=_TOLERANCE):
        raise BenchError(
            f"expected identity experts to give back {len(tokens)} tokens, "
            f"found a difference of {float((outputs - tokens).abs().max()):.3g}"
        )


def _parts(tokens: Tensor, choices: Tensor) -> list[NDArray[np.float32]]:
    """The rows of each expert: the bytes that the engine sends."""
    return [tokens[(choices == expert_id).any(dim=1)].numpy() for expert_id in range(NUM_EXPERTS)]


EXCHANGE = Suite("exchange", "8 no-op experts: the engine, from gate to combine, beside moving the same bytes", _run)
