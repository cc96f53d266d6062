from __future__ import annotations

import pytest
import torch

from moe_runtime.demos.digits.recipe import LAYER
from moe_runtime.demos.digits.result import DigitsResult
from moe_runtime.demos.digits.summary import batch_sizes, served_experts
from moe_runtime.demos.digits.traffic import Answer, Traffic
from moe_runtime.wire.messages import ForwardResult, Report


def answer_of(num_tokens: int, *, batch_tokens: int) -> Answer:
    report = Report("", LAYER, 1, num_tokens, 0, 0, 0, 0, 0, batch_tokens=(batch_tokens,))
    return Answer(torch.arange(num_tokens), ForwardResult(None, report), latency_ms=1.0)


def test_requests_that_shared_a_batch_count_as_one() -> None:
    answers = [
        answer_of(3, batch_tokens=5),
        answer_of(7, batch_tokens=7),
        answer_of(2, batch_tokens=5),
        answer_of(5, batch_tokens=5),
    ]

    assert batch_sizes(answers) == {5: 2, 7: 1}


def test_mean_time_counts_only_what_was_measured() -> None:
    description = {
        "layers": {LAYER: {"experts": [{"name": "a", "kind": "conv", "replicas": [{"pid": 7, "device": "cpu"}]}]}}
    }

    def status(num_products: int, compute_ms: float) -> dict[str, object]:
        return {"layers": {LAYER: {"experts": [{"num_products": num_products, "compute_ms": compute_ms}]}}}

    (expert,) = served_experts(description, before=status(10, 500.0), after=status(14, 506.0))

    assert (expert.name, expert.kind, expert.pid, expert.device) == ("a", "conv", 7, "cpu")
    assert expert.mean_ms == pytest.approx(1.5)


def test_every_assignment_is_accounted_for(result: DigitsResult) -> None:
    assert result.num_tokens == 2 * result.num_images
    assert result.num_assignments == 2 * result.num_tokens
    assert sum(expert.num_assignments for expert in result.experts) == result.num_assignments
    assert sum(expert.num_dropped_capacity for expert in result.experts) == result.num_dropped_capacity
    assert sum(expert.num_dropped_failure for expert in result.experts) == result.num_dropped_failure
    assert sum(expert.share for expert in result.experts) == pytest.approx(1.0)


def test_all_batches_together_carried_every_token(result: DigitsResult) -> None:
    assert sum(size * count for size, count in result.batch_sizes.items()) == result.num_tokens
    assert list(result.batch_sizes) == sorted(result.batch_sizes)


def test_the_served_layer_is_as_accurate_as_promised(result: DigitsResult) -> None:
    result.check()

    assert result.accuracy >= 0.96
    assert result.max_difference <= 1e-5


def test_latencies_and_throughput_are_those_of_the_answers(traffic: Traffic, result: DigitsResult) -> None:
    latencies_ms = sorted(answer.latency_ms for answer in traffic.answers)

    assert latencies_ms[0] <= result.p50_ms <= result.p99_ms <= latencies_ms[-1]
    assert result.tokens_per_s == pytest.approx(result.num_tokens / traffic.wall_s)
