"""From answers, reference and the router's own account to the demo's result."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.demos.digits.recipe import LAYER
from moe_runtime.demos.digits.result import DigitsResult, ExpertResult
from moe_runtime.wire.messages import DROPPED_CAPACITY, DROPPED_FAILURE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from moe_runtime.demos.digits.reference import Reference
    from moe_runtime.demos.digits.traffic import Answer, Load, Traffic


@dataclass(frozen=True)
class ServedExpert:
    """What the router says about one expert.

    Attributes:
        name: Unique in the layer.
        kind: Its kind.
        pid: Process id of its actor.
        device: Device that it computes on.
        mean_ms: Mean time of one of its forwards while the requests were measured.
    """

    name: str
    kind: str
    pid: int
    device: str
    mean_ms: float


@dataclass(frozen=True)
class Preparation:
    """What came before the requests; the fields are those of ``DigitsResult``."""

    config_path: Path
    training_s: float | None
    starting_s: float


def served_experts(
    description: Mapping[str, Any], *, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[ServedExpert, ...]:
    """The layer's experts, from a client's ``describe()`` and from ``status()`` before and after the requests."""
    experts = description["layers"][LAYER]["experts"]
    counters = zip(before["layers"][LAYER]["experts"], after["layers"][LAYER]["experts"], strict=True)
    return tuple(
        ServedExpert(
            name=expert["name"],
            kind=expert["kind"],
            pid=expert["replicas"][0]["pid"],
            device=expert["replicas"][0]["device"],
            mean_ms=(end["compute_ms"] - start["compute_ms"]) / max(1, end["num_products"] - start["num_products"]),
        )
        for expert, (start, end) in zip(experts, counters, strict=True)
    )


def summarise(
    traffic: Traffic,
    *,
    load: Load,
    reference: Reference,
    experts: Sequence[ServedExpert],
    preparation: Preparation,
) -> DigitsResult:
    """Everything that the demo reports."""
    answers = traffic.answers
    reports = [answer.result.report for answer in answers]
    latencies_ms = [answer.latency_ms for answer in answers]
    sizes = [report.num_tokens for report in reports]
    return DigitsResult(
        accuracy=sum(map(reference.num_right, answers)) / sum(sizes),
        experts=_expert_results(answers, experts, reference=reference),
        max_difference=float(np.max([reference.difference(answer) for answer in answers])),
        num_images=reference.num_images,
        num_requests=len(answers),
        num_tokens=sum(sizes),
        request_sizes=(min(sizes), max(sizes)),
        concurrency=load.concurrency,
        num_assignments=sum(report.num_assignments for report in reports),
        num_dropped_capacity=sum(report.num_dropped_capacity for report in reports),
        num_dropped_failure=sum(report.num_dropped_failure for report in reports),
        batch_sizes=batch_sizes(answers),
        p50_ms=float(np.percentile(latencies_ms, 50)),
        p99_ms=float(np.percentile(latencies_ms, 99)),
        tokens_per_s=sum(sizes) / traffic.wall_s,
        training_s=preparation.training_s,
        starting_s=preparation.starting_s,
        config_path=preparation.config_path,
    )


def batch_sizes(answers: Sequence[Answer]) -> dict[int, int]:
    """Number of batches by their size in tokens, ascending.

    A report names the size of the batch that carried the request, not the batch. But the requests of one
    batch of n tokens have n tokens together, and none of the demo's is large enough to be split.
    """
    tokens_by_size: dict[int, int] = defaultdict(int)
    for answer in answers:
        (size,) = answer.result.report.batch_tokens
        tokens_by_size[size] += answer.result.report.num_tokens
    return {size: tokens_by_size[size] // size for size in sorted(tokens_by_size)}


def _expert_results(
    answers: Sequence[Answer], experts: Sequence[ServedExpert], *, reference: Reference
) -> tuple[ExpertResult, ...]:
    """Assignments by expert and outcome, from the answers' routing."""
    reports = [answer.result.report for answer in answers]
    expert_ids = np.concatenate([report.expert_ids for report in reports if report.expert_ids is not None])
    outcomes = np.concatenate([report.outcomes for report in reports if report.outcomes is not None])
    counts = np.zeros((len(experts), 3), dtype=int)
    np.add.at(counts, (expert_ids, outcomes), 1)
    return tuple(
        ExpertResult(
            name=expert.name,
            kind=expert.kind,
            pid=expert.pid,
            device=expert.device,
            accuracy=accuracy,
            num_assignments=int(row.sum()),
            share=float(row.sum() / counts.sum()),
            num_dropped_capacity=int(row[DROPPED_CAPACITY]),
            num_dropped_failure=int(row[DROPPED_FAILURE]),
            mean_ms=expert.mean_ms,
        )
        for expert, accuracy, row in zip(experts, reference.expert_accuracies(), counts, strict=True)
    )
