"""Suite `service`: what gRPC, the batcher and concurrent clients cost, beside the same requests without gRPC."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.children import Child
from moe_runtime.bench.deployment import deploy, layer_config, ray_cluster
from moe_runtime.bench.load import LibraryService, Traffic, serve_grpc_load, time_per_request
from moe_runtime.bench.results import Row
from moe_runtime.bench.sampling import Sample, rounds
from moe_runtime.bench.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moe_runtime.bench.deployment import Deployment
    from moe_runtime.bench.suite import BenchSettings

_LIBRARY = "library mode"
_FEATURES = 1024
_MIN_REQUESTS, _REQUESTS_PER_CLIENT, _MAX_REQUESTS = 16, 8, 256
_MIXED_SIZES = (1, 2, 4, 8, 16, 16, 32, 64)
_KINDS = {"ffn": ("feed_forward", {"hidden_features": 4096}), "noop": ("identity", {})}


@dataclass(frozen=True)
class _Case:
    """Clients, tokens per request (0: mixed), and routers."""

    clients: int
    tokens: int
    routers: int

    @property
    def num_requests(self) -> int:
        """How many make a run: several per client, as far as time allows."""
        return min(_MAX_REQUESTS, max(_MIN_REQUESTS, self.clients * _REQUESTS_PER_CLIENT))

    def requests(self) -> list[Tensor]:
        """What the clients send, in turns."""
        generator = torch.Generator().manual_seed(self.tokens)
        sizes = [self.tokens] * 8 if self.tokens else _MIXED_SIZES
        return [torch.randn(size, _FEATURES, generator=generator) for size in sizes]


_CASES = (
    _Case(1, 16, 1), _Case(4, 16, 1), _Case(16, 16, 1), _Case(64, 16, 1), _Case(16, 0, 1), _Case(16, 16, 2),
    _Case(64, 16, 2),
)  # fmt: skip
_QUICK_CASES = (_Case(1, 16, 1), _Case(16, 16, 1))


def _run(settings: BenchSettings) -> Iterator[Row]:
    with ray_cluster(), contextlib.closing(Child(serve_grpc_load)) as clients:
        for expert in ("ffn",) if settings.quick else _KINDS:
            kind, options = _KINDS[expert]
            starting = settings.begin(f"Starting 8 {expert} actors and 2 routers")
            config = layer_config(kind=kind, options=options, num_routers=2)
            with (
                deploy(config, on_progress=starting.update) as deployment,
                contextlib.closing(LibraryService(deployment)) as library,
            ):
                cases = _QUICK_CASES if settings.quick else _CASES
                measuring = settings.begin(f"Calling {expert}")
                for num_done, case in enumerate(cases, start=1):
                    yield _measure(case, expert, deployment=deployment, clients=clients, library=library,
                                   settings=settings)  # fmt: skip
                    measuring.update(num_done, len(cases))


def _measure(
    case: _Case, expert: str, *, deployment: Deployment, clients: Child, library: LibraryService,
    settings: BenchSettings,
) -> Row:  # fmt: skip
    requests = case.requests()
    addresses = deployment.runtime.addresses[: case.routers]
    num_requests = case.num_requests // (2 if settings.quick else 1)
    arrays = [tokens.numpy() for tokens in requests]
    ours: list[Traffic] = []
    theirs: list[Traffic] = []
    for _ in rounds(settings.load_effort):
        ours.append(clients.ask(addresses, arrays, case.clients, num_requests))
        theirs.append(library.send(requests, num_callers=case.clients, num_requests=num_requests))
    return Row(
        "service",
        {"expert": expert, "clients": case.clients, "tokens": case.tokens or "mixed", "routers": case.routers},
        _LIBRARY,
        time_per_request(ours),
        time_per_request(theirs),
        _figures(ours),
    )


def _figures(runs: Sequence[Traffic]) -> dict[str, float]:
    latencies = Sample.of([seconds for run in runs for seconds in run.latencies_s])
    wall_s, num_tokens = sum(run.wall_s for run in runs), sum(run.num_tokens for run in runs)
    return {
        "tokens_per_s": num_tokens / wall_s,
        "p50_ms": latencies.median_ms,
        "p99_ms": latencies.quantile(0.99),
        "batch_tokens": sum(run.mean_batch_tokens for run in runs) / len(runs),
    }


SERVICE = Suite("service", "concurrent gRPC clients, beside the same requests to the library mode; per request", _run)
