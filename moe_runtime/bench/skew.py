"""Suite `skew`: imbalanced load, shape by shape, beside uniform load in the same run."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.bench.deployment import deploy, layer_config, ray_cluster
from moe_runtime.bench.library import gate_weight
from moe_runtime.bench.load import LibraryService, Traffic, time_per_request
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import rounds
from moe_runtime.bench.shapes import SHAPES
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import tokens_for
from moe_runtime.launch.router_process import build_routed_layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moe_runtime.bench.deployment import Deployment
    from moe_runtime.bench.shapes import Shape
    from moe_runtime.bench.suite import BenchSettings

_NUM_EXPERTS, _EXPERTS_PER_ACTOR = 8, 2
_TOKENS, _CALLERS = 16, 16
_HIDDEN = 1024
_CAPACITY = 1.25
_UNIFORM = SHAPES[0]
_QUICK_SHAPES = ("W1", "W7")


@dataclass(frozen=True)
class _Load:
    """A shape's requests."""

    shape: Shape
    requests: Sequence[Tensor]

    def send(self, library: LibraryService, num_requests: int) -> Traffic:
        """Send so many; a bursty shape sends them in bursts, each when the last one was answered."""
        return library.send(
            self.requests, num_callers=_CALLERS * self.shape.burst, num_requests=num_requests * self.shape.burst
        )


def _run(settings: BenchSettings) -> Iterator[Row]:
    shapes = [s for s in SHAPES[1:] if not settings.quick or s.name in _QUICK_SHAPES]
    with ray_cluster():
        for capacity in (_CAPACITY,) if settings.quick else (None, _CAPACITY):
            starting = settings.begin(f"Starting 8 experts on 4 actors, capacity factor {capacity or 'none'}")
            config = layer_config(
                num_experts=_NUM_EXPERTS,
                kind="feed_forward",
                options={"hidden_features": _HIDDEN},
                experts_per_actor=_EXPERTS_PER_ACTOR,
                policy={"kind": "top_k", "k": 1},
                capacity={"factor": capacity},
            )
            with (
                deploy(config, on_progress=starting.update) as deployment,
                contextlib.closing(LibraryService(deployment)) as library,
            ):
                measuring = settings.begin("Sending skewed load")
                uniform = _load(_UNIFORM, deployment, settings)
                for num_done, shape in enumerate(shapes, start=1):
                    load = _load(shape, deployment, settings)
                    yield _measure(load, uniform, library=library, capacity=capacity, settings=settings)
                    measuring.update(num_done, len(shapes))


def _load(shape: Shape, deployment: Deployment, settings: BenchSettings) -> _Load:
    weight = gate_weight(build_routed_layer(deployment.recipe))
    choices = (shape.choices(i, num_tokens=_TOKENS, num_experts=_NUM_EXPERTS) for i in range(_num_requests(settings)))
    return _Load(shape, [tokens_for(weight, wanted, seed=i) for i, wanted in enumerate(choices)])


def _num_requests(settings: BenchSettings) -> int:
    return 64 if settings.quick else 320


def _measure(
    load: _Load, uniform: _Load, *, library: LibraryService, capacity: float | None, settings: BenchSettings
) -> Row:
    ours: list[Traffic] = []
    theirs: list[Traffic] = []
    for _ in rounds(settings.load_effort):
        ours.append(load.send(library, _num_requests(settings)))
        theirs.append(uniform.send(library, _num_requests(settings)))
    return Row(
        "skew",
        {"shape": load.shape.name, "capacity": capacity or "none"},
        "W0, uniform",
        time_per_request(ours),
        time_per_request(theirs),
        _figures(ours),
    )


def _figures(runs: Sequence[Traffic]) -> dict[str, float]:
    reports = [report for run in runs for report in run.reports]
    queue_ms = sorted(report.timings.queue_ms for report in reports)
    return {
        "tokens_per_s": sum(run.num_tokens for run in runs) / sum(run.wall_s for run in runs),
        "dropped_share": sum(r.num_dropped_capacity for r in reports) / sum(r.num_assignments for r in reports),
        "queue_p50_ms": statistics.median(queue_ms),
        "queue_p99_ms": queue_ms[int(0.99 * len(queue_ms))],
    }


SKEW = Suite("skew", "imbalanced load W1 to W7, beside uniform load W0; per request of 16 tokens", _run)
