from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.demos.digits.traffic import Load, mixed_requests, send
from moe_runtime.errors import UnavailableError
from moe_runtime.wire.messages import ForwardResult, Report

PIXELS = torch.arange(40.0)[:, None].expand(-1, 64)


class Echo:
    """Answers with what it was sent, after ``num_together`` calls have arrived together."""

    def __init__(self, num_together: int = 1) -> None:
        self.barrier = threading.Barrier(num_together, timeout=30)

    def forward(self, inputs: Tensor, **_: Any) -> ForwardResult:
        self.barrier.wait()
        num = len(inputs)
        report = Report("", "digits", 1, num, num, num, 0, 0, 0, batch_tokens=(num,))
        return ForwardResult(inputs, report)


class Broken:
    """Fails the third call, and every one after it."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.lock = threading.Lock()
        self.echo = Echo()

    def forward(self, inputs: Tensor, **_: Any) -> ForwardResult:
        with self.lock:
            self.num_calls += 1
            if self.num_calls >= 3:
                raise UnavailableError("gone")
        return self.echo.forward(inputs)


@pytest.mark.parametrize(("num_images", "num_requests"), [(40, 16), (16, 16), (5, 1), (1, 1)])
def test_every_image_is_in_one_request_of_a_round_and_no_request_is_empty(num_images: int, num_requests: int) -> None:
    requests = mixed_requests(num_images, num_requests, generator=torch.Generator().manual_seed(0))

    assert len(requests) == num_requests
    assert min(map(len, requests)) >= 1
    assert sorted(torch.cat(requests).tolist()) == list(range(num_images))


def test_requests_are_of_mixed_sizes() -> None:
    sizes = {len(ids) for ids in mixed_requests(450, 16, generator=torch.Generator().manual_seed(0))}

    assert len(sizes) > 8


def test_as_many_requests_are_under_way_at_once_as_the_load_says() -> None:
    traffic = send(Echo(num_together=4), PIXELS, layer="digits", load=Load(num_rounds=3, concurrency=4))

    assert len(traffic.answers) == 12


def test_every_image_is_sent_once_per_round_and_answers_keep_their_images() -> None:
    answered = []
    traffic = send(
        Echo(), PIXELS, layer="digits", load=Load(num_rounds=3, concurrency=4), on_answer=lambda: answered.append(1)
    )

    assert len(answered) == 12
    assert sorted(torch.cat([a.image_ids for a in traffic.answers]).tolist()) == sorted([*range(40)] * 3)
    assert all(torch.equal(a.result.outputs, PIXELS[a.image_ids]) for a in traffic.answers)
    assert all(0 <= a.latency_ms <= traffic.wall_s * 1e3 for a in traffic.answers)


def test_the_first_error_stops_all_requests() -> None:
    client = Broken()

    with pytest.raises(UnavailableError, match="gone"):
        send(client, PIXELS, layer="digits", load=Load(num_rounds=100, concurrency=4))

    assert client.num_calls < 10
