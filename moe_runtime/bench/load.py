"""Closed-loop load: so many callers, each of which sends its next request when it has its answer."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.deployment import LAYER
from moe_runtime.bench.errors import BenchError
from moe_runtime.bench.sampling import Sample
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.service.requests import LayerAnswer, LayerRequest
from moe_runtime.service.router_service import RouterService
from moe_runtime.transport.zmq_router import ZmqTransport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_runtime.bench.deployment import Deployment
    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.wire.messages import Report

_TIMEOUT_S = 120.0


@dataclass
class Traffic:
    """What a run of requests came to.

    Attributes:
        wall_s: From the first request to the last answer.
        num_tokens: In all requests.
        latencies_s: One per request, at the caller.
        reports: One per request.
    """

    wall_s: float = 0.0
    num_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def add(self, seconds: float, report: Report) -> None:
        """Count an answer.

        Raises:
            BenchError: If an expert failed.
        """
        if report.num_dropped_failure:
            raise BenchError(f"experts failed: {'; '.join(report.warnings)}")
        self.latencies_s.append(seconds)
        self.reports.append(report)
        self.num_tokens += report.num_tokens

    @property
    def mean_batch_tokens(self) -> float:
        """Tokens of the batch that a request was in, on average over requests."""
        sizes = [tokens for report in self.reports for tokens in report.batch_tokens]
        return sum(sizes) / len(sizes)


def time_per_request(runs: Sequence[Traffic]) -> Sample:
    """Time per answered request at this concurrency, one per run: the inverse of the throughput."""
    return Sample.of([run.wall_s / len(run.latencies_s) for run in runs])


class LibraryService:
    """The router service in this process, without gRPC: the library mode; used by one thread."""

    def __init__(self, deployment: Deployment) -> None:
        """Connect a service of its own to a deployment's expert actors."""
        torch.set_num_threads(1)
        self._service = RouterService(
            {LAYER: build_routed_layer(deployment.recipe)},
            ZmqTransport(node=deployment.node),
            router=RouterConfig(),
            limits=LimitsConfig(default_timeout_s=_TIMEOUT_S),
            node=deployment.node,
        )
        self._service.start()
        self._service.set_table(deployment.table)

    def send(self, requests: Sequence[Tensor], *, num_callers: int, num_requests: int) -> Traffic:
        """Send so many requests, so many at a time; request i carries ``requests[i % len(requests)]``.

        Raises:
            BenchError: If one is answered with an error.
        """
        run = _ServiceRun(self._service, requests, num_callers=num_callers, num_requests=num_requests)
        return run.wait()

    def close(self) -> None:
        """Disconnect."""
        self._service.close()


class _ServiceRun:
    """One run against a service: every answer sends the next request, from the service's own thread."""

    def __init__(
        self, service: RouterService, requests: Sequence[Tensor], *, num_callers: int, num_requests: int
    ) -> None:
        self._service = service
        self._requests = requests
        self._num_requests = num_requests
        self._num_callers = min(num_callers, num_requests)
        self._num_sent = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: Exception | None = None
        self._traffic = Traffic()

    def wait(self) -> Traffic:
        started = time.perf_counter()
        for _ in range(self._num_callers):
            self._send_next()
        if not self._done.wait(_TIMEOUT_S):
            raise BenchError(f"the service has not answered everything within {_TIMEOUT_S:g} s")
        if self._error is not None:
            raise BenchError(f"the service answered with an error: {self._error}") from self._error
        self._traffic.wall_s = time.perf_counter() - started
        return self._traffic

    def _send_next(self) -> None:
        with self._lock:
            number = self._num_sent
            self._num_sent += 1
        if number >= self._num_requests:
            return
        tokens = self._requests[number % len(self._requests)]
        started = time.perf_counter()

        def on_done(answer: LayerAnswer | MoERuntimeError) -> None:
            self._finish(answer, time.perf_counter() - started)

        self._service.submit(LayerRequest(str(number), LAYER, tokens), on_done)

    def _finish(self, answer: LayerAnswer | MoERuntimeError, seconds: float) -> None:
        try:
            if not isinstance(answer, LayerAnswer):
                raise answer
            self._traffic.add(seconds, answer.report)
            if len(self._traffic.latencies_s) == self._num_requests:
                self._done.set()
            else:
                self._send_next()
        except Exception as exc:
            self._error = exc
            self._done.set()


def serve_grpc_load(connection: Connection) -> None:
    """A process of gRPC clients: runs each load that it is told, until the parent closes the connection."""
    while True:
        addresses, requests, num_callers, num_requests = connection.recv()
        connection.send(asyncio.run(_send_grpc(addresses, requests, num_callers, num_requests)))


async def _send_grpc(
    addresses: Sequence[str], requests: Sequence[NDArray[np.float32]], num_callers: int, num_requests: int
) -> Traffic:
    numbers = iter(range(num_requests))
    traffic = Traffic()

    async def call_in_turn(client: AsyncMoEClient) -> None:
        for number in numbers:
            tokens = requests[number % len(requests)]
            started = time.perf_counter()
            result = await client.forward(tokens, layer=LAYER, timeout_s=_TIMEOUT_S)
            traffic.add(time.perf_counter() - started, result.report)

    async with AsyncMoEClient(addresses) as client:
        # Connections are made by a first round that does not count.
        await asyncio.gather(*(client.forward(requests[0], layer=LAYER) for _ in addresses))
        started = time.perf_counter()
        await asyncio.gather(*(call_in_turn(client) for _ in range(num_callers)))
        traffic.wall_s = time.perf_counter() - started
    return traffic
