"""The demo's load: concurrent requests of mixed sizes from ordinary client threads, timed where a caller feels it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_runtime.wire.messages import ForwardResult


class Client(Protocol):
    """What the load needs of a client; thread-safe."""

    def forward(self, inputs: Tensor, *, layer: str, timeout_s: float | None, return_routing: bool) -> ForwardResult:
        """Run a layer over some tokens."""
        ...


@dataclass(frozen=True)
class Load:
    """How much is sent.

    Attributes:
        num_rounds: Times that every image is sent.
        concurrency: Requests under way at once, and requests per round.
        timeout_s: Deadline of each request.
        seed: Of the requests' sizes and images.
    """

    num_rounds: int = 40
    concurrency: int = 16
    timeout_s: float = 10.0
    seed: int = 0


DEFAULT_LOAD = Load()


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        image_ids: The images that it asked about, int64 ``(num_tokens,)``.
        result: Logits ``(num_tokens, 10)`` and the report, routing included.
        latency_ms: From the call to its return, at the client.
    """

    image_ids: Tensor
    result: ForwardResult
    latency_ms: float


@dataclass(frozen=True)
class Traffic:
    """Everything that was answered, and the seconds from the first call to the last return."""

    answers: tuple[Answer, ...]
    wall_s: float


def mixed_requests(num_images: int, num_requests: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    """All images in random order, cut at random places into requests of at least one."""
    cuts = torch.randperm(num_images - 1, generator=generator)[: num_requests - 1].sort().values + 1
    return torch.randperm(num_images, generator=generator).tensor_split(cuts)


def send(
    client: Client, pixels: Tensor, *, layer: str, load: Load, on_answer: Callable[[], None] = lambda: None
) -> Traffic:
    """Send every image in every round, ``concurrency`` requests at a time.

    Args:
        client: Shared by the threads.
        pixels: The images, ``(num_images, 64)``.
        layer: Name of the layer.
        load: How much.
        on_answer: Called after each answer, from the thread that got it.

    Raises:
        MoERuntimeError: The first error that a request ended with; the other threads stop.
    """
    generator = torch.Generator().manual_seed(load.seed)
    rounds = [mixed_requests(len(pixels), load.concurrency, generator=generator) for _ in range(load.num_rounds)]
    stopping = threading.Event()

    def call_in_turn(requests: Sequence[Tensor]) -> list[Answer]:
        answers = []
        try:
            for image_ids in requests:
                if stopping.is_set():
                    break
                answers.append(_call(client, pixels, image_ids, layer=layer, timeout_s=load.timeout_s))
                on_answer()
        except BaseException:
            stopping.set()
            raise
        return answers

    with ThreadPoolExecutor(load.concurrency, thread_name_prefix="demo-client") as threads:
        started = time.perf_counter()
        try:
            parts = list(threads.map(call_in_turn, zip(*rounds, strict=True)))
        finally:
            stopping.set()
        wall_s = time.perf_counter() - started
    return Traffic(tuple(answer for part in parts for answer in part), wall_s)


def _call(client: Client, pixels: Tensor, image_ids: Tensor, *, layer: str, timeout_s: float) -> Answer:
    rows = pixels[image_ids]
    started = time.perf_counter()
    result = client.forward(rows, layer=layer, timeout_s=timeout_s, return_routing=True)
    return Answer(image_ids, result, (time.perf_counter() - started) * 1e3)
