"""Suite `layer`: a layer of real experts in actors, beside the best that one process can do."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.bench.deployment import deploy, layer_config, library_layer, ray_cluster, recipe_of
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.in_process import IMPLEMENTATIONS, InProcessLayer
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Contender, interleave, time_calls
from moe_runtime.bench.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from moe_runtime.bench.in_process import Implementation
    from moe_runtime.bench.library import LibraryLayer
    from moe_runtime.bench.sampling import Sample
    from moe_runtime.bench.suite import BenchSettings

_NUM_EXPERTS = 8
_SIZES = (1, 4, 16, 64, 256, 1024)
_QUICK_SIZES = (1, 64)
_THREADS = (1, 2)
_FEATURES = 1024
#: Sums of a few thousand float32 products, in another order.
_TOLERANCE = 1e-3
BEST = "best in-process"


@dataclass(frozen=True)
class _Expert:
    """Name in the rows, kind and options."""

    name: str
    kind: str
    options: Mapping[str, Any]


_EXPERTS = (
    _Expert("ffn", "feed_forward", {"hidden_features": 4096, "bias": False}),
    _Expert("swiglu", "swiglu", {"hidden_features": 2816}),
)


def _run(settings: BenchSettings) -> Iterator[Row]:
    with ray_cluster():
        for expert in _EXPERTS[:1] if settings.quick else _EXPERTS:
            yield from _measure(expert, settings)


def _missing() -> str | None:
    if find_spec("transformers") is not None:
        return None
    return "expected transformers, whose layers are the peers, not installed: pip install 'moe-runtime[bench]'"


def _measure(expert: _Expert, settings: BenchSettings) -> Iterator[Row]:
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    starting = settings.begin(f"Starting 8 {expert.name} actors, and one process with the same experts")
    config = layer_config(num_experts=_NUM_EXPERTS, kind=expert.kind, options=expert.options)
    with contextlib.ExitStack() as stack:
        # Before the actors: it loads the libraries of the peers meanwhile.
        peers = stack.enter_context(contextlib.closing(InProcessLayer(recipe_of(config))))
        deployment = stack.enter_context(deploy(config, on_progress=starting.update))
        ours = stack.enter_context(library_layer(deployment))
        peers.wait_until_ready()
        measuring = settings.begin(f"Forwards of {expert.name}")
        for num_done, num_tokens in enumerate(sizes, start=1):
            generator = torch.Generator().manual_seed(num_tokens)
            tokens = torch.randn(num_tokens, _FEATURES, generator=generator)
            yield from _case(expert.name, tokens, ours=ours, peers=peers, settings=settings)
            measuring.update(num_done, len(sizes))


def _case(
    expert: str, tokens: Tensor, *, ours: LibraryLayer, peers: InProcessLayer, settings: BenchSettings
) -> Iterator[Row]:
    peers.set_tokens(tokens)
    _check(ours, tokens, peers)
    samples = interleave(_contenders(ours, tokens, peers), effort=settings.effort)
    case = {"expert": expert, "tokens": len(tokens)}
    fastest: dict[str, Sample] = {}
    for implementation in IMPLEMENTATIONS:
        by_threads = {n: samples[_name(implementation, n)] for n in _THREADS}
        num_threads = min(by_threads, key=lambda n: by_threads[n].median_ms)
        fastest[implementation] = by_threads[num_threads]
        yield Row(
            "layer", case, implementation, samples["ours"], fastest[implementation], {"peer_threads": num_threads}
        )
    best = min(fastest.values(), key=lambda sample: sample.median_ms)
    yield Row("layer", case, BEST, samples["ours"], best)


def _contenders(ours: LibraryLayer, tokens: Tensor, peers: InProcessLayer) -> Sequence[Contender]:
    return [
        Contender("ours", lambda n: time_calls(lambda: ours.forward(tokens), n)),
        *(
            Contender(_name(implementation, num_threads), _timer(peers, implementation, num_threads))
            for implementation in IMPLEMENTATIONS
            for num_threads in _THREADS
        ),
    ]


def _timer(peers: InProcessLayer, implementation: Implementation, num_threads: int) -> Callable[[int], Sequence[float]]:
    return lambda num_calls: peers.time_calls(implementation, num_threads, num_calls)


def _name(implementation: str, num_threads: int) -> str:
    return f"{implementation} {num_threads}"


def _check(ours: LibraryLayer, tokens: Tensor, peers: InProcessLayer) -> None:
    outputs = ours.forward(tokens).outputs
    for implementation in IMPLEMENTATIONS:
        expected = peers.outputs(implementation)
        if not torch.allclose(outputs, expected, atol=_TOLERANCE, rtol=_TOLERANCE):
            difference = float((outputs - expected).abs().max())
            raise BenchError(
                f"layer: expected the outputs of {implementation} for {len(tokens)} tokens within {_TOLERANCE:g}, "
                f"found a difference of {difference:.3g}"
            )


LAYER_SUITE = Suite(
    "layer", "top-2 of 8 experts in actors, beside the best implementation in one process", _run, _missing
)
