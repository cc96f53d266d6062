"""Accounts for every assignment of a batch, request by request."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moe_runtime.wire.messages import DROPPED_CAPACITY, DROPPED_FAILURE, SERVED, Report, Timings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.requests import LayerRequest

ScalarT = TypeVar("ScalarT", bound=np.generic)

_MS = 1000.0


@dataclass(frozen=True)
class PartReport:
    """What happened to consecutive rows of one request in one batch.

    Attributes:
        start: First row of the part within its request.
        report: Counts and, if asked for, the routing of these rows; its ``token_ids`` count from ``start``.
    """

    start: int
    report: Report


class BatchLedger:
    """The outcome of every assignment of a finished batch, ready to be split by request.

    Args:
        result: The finished batch.
        layer: Its layer.
    """

    def __init__(self, result: BatchResult, layer: RoutedLayer) -> None:
        plan, admission = result.plan, result.plan.admission
        assignments = admission.assignments
        self._result = result
        self._layer = layer
        self._token_ids: NDArray[np.int64] = assignments.token_ids.numpy()
        self._expert_ids: NDArray[np.int64] = assignments.expert_ids.numpy()
        self._ranks: NDArray[np.int64] = assignments.ranks.numpy()
        self._rerouted: NDArray[np.bool_] = admission.rerouted.numpy()
        self._outcomes = np.full(len(self._token_ids), DROPPED_CAPACITY, dtype=np.uint8)
        self._weights = np.zeros(len(self._token_ids), dtype=np.float32)
        planned = plan.assignment_ids.numpy()
        self._outcomes[planned] = np.where(result.served.numpy(), SERVED, DROPPED_FAILURE)
        self._weights[planned] = result.weights.numpy()
        self._retried = self._hedged = np.zeros(len(self._token_ids), dtype=np.bool_)
        if result.failures is not None:
            self._retried, self._hedged = self._retried.copy(), self._hedged.copy()
            self._retried[planned[[*result.failures.retried]]] = True
            self._hedged[planned[[*result.failures.hedged]]] = True
        self._num_tokens = assignments.num_tokens
        self._is_shared = self._expert_ids >= assignments.num_routed if assignments.num_shared else None

    def part(self, *, first_row: int, last_row: int, queue_s: float, return_routing: bool) -> Report:
        """The report on rows ``[first_row, last_row)`` of the batch, as if they were a request of their own."""
        mine = (self._token_ids >= first_row) & (self._token_ids < last_row)
        shared, routed = self._split(mine)
        times = self._result.times
        counts = np.bincount(self._outcomes[routed], minlength=3).tolist()
        num_shared_served = 0 if shared is None else int((self._outcomes[shared] == SERVED).sum())
        report = Report(
            request_id="",
            layer=self._layer.name,
            table_version=self._result.table_version,
            num_tokens=last_row - first_row,
            num_assignments=int(routed.sum()),
            num_served=counts[SERVED],
            num_dropped_capacity=counts[DROPPED_CAPACITY],
            num_dropped_failure=counts[DROPPED_FAILURE],
            num_rerouted=int(self._rerouted[routed].sum()),
            num_retried=int(self._retried[routed].sum()),
            num_hedged=int(self._hedged[routed].sum()),
            num_shared_served=num_shared_served,
            num_shared_dropped=0 if shared is None else int(shared.sum()) - num_shared_served,
            batch_tokens=(self._num_tokens,),
            timings=Timings(
                queue_ms=queue_s * _MS,
                gate_ms=times.gate_s * _MS,
                experts_ms=times.experts_s * _MS,
                combine_ms=times.combine_s * _MS,
            ),
            warnings=(
                *self._warnings(mine),
                *self._overflow_warning(first_row, last_row),
            ),
        )
        if not return_routing:
            return report
        report = self._with_routing(report, routed, first_row)
        return report if shared is None else self._with_shared_weights(report, shared, first_row)

    def _split(self, mine: NDArray[np.bool_]) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_]]:
        """Assignments to shared experts, None where there are no such experts, and those that the policy asked for."""
        if self._is_shared is None:
            return None, mine
        return mine & self._is_shared, mine & ~self._is_shared

    def _with_routing(self, report: Report, mine: NDArray[np.bool_], first_row: int) -> Report:
        order = np.lexsort((self._ranks[mine], self._token_ids[mine]))
        return replace(
            report,
            token_ids=(self._token_ids[mine] - first_row)[order],
            expert_ids=self._expert_ids[mine][order],
            expert_weights=self._weights[mine][order],
            outcomes=self._outcomes[mine][order],
        )

    def _with_shared_weights(self, report: Report, shared: NDArray[np.bool_], first_row: int) -> Report:
        weights = np.zeros((report.num_tokens, self._layer.num_shared), dtype=np.float32)
        places = self._expert_ids[shared] - self._layer.num_routed
        weights[self._token_ids[shared] - first_row, places] = self._weights[shared]
        return replace(report, shared_weights=weights)

    def _warnings(self, mine: NDArray[np.bool_]) -> tuple[str, ...]:
        """Which experts failed these assignments, why, and what became of those: each sentence once."""
        failures = self._result.failures
        if failures is None:
            return ()
        planned = self._result.plan.assignment_ids.numpy()
        warnings: dict[str, None] = {}
        for expert_id, rows, reason, _ in failures.attempts:
            failed = planned[[*rows]]
            failed = failed[mine[failed]]
            is_dropped = self._outcomes[failed] == DROPPED_FAILURE
            is_elsewhere = self._expert_ids[failed] != expert_id
            fates = (
                (is_dropped, ""),
                (~is_dropped & is_elsewhere, "; rerouted"),
                (~is_dropped & ~is_elsewhere, "; served by another replica"),
            )
            for applies, fate in fates:
                if applies.any():
                    warnings[f"expert {self._layer.experts[expert_id].name}: {reason}{fate}"] = None
        return tuple(warnings)

    def _overflow_warning(self, first_row: int, last_row: int) -> tuple[str, ...]:
        overflowed = self._result.overflowed
        num_rows = 0 if overflowed is None else int(overflowed[first_row:last_row].sum())
        if num_rows == 0:
            return ()
        dtype = str(self._layer.dtype).removeprefix("torch.")
        return (f"{num_rows} output rows are not finite: their weighted sum left the range of {dtype}",)


def merge_parts(
    request_id: str, parts: Sequence[PartReport], *, total_s: float, warnings: tuple[str, ...] = ()
) -> Report:
    """One report for a request from those of its parts.

    Args:
        request_id: The request's.
        parts: In the order of the request's rows; at least one.
        total_s: Seconds from the request's arrival to its answer.
        warnings: Warnings about the request itself, before those about its batches.

    Returns:
        Counts and stage times are summed, batches and warnings listed, routing joined; the table version is
        the last part's.
    """
    reports = [part.report for part in parts]
    return replace(
        reports[-1],
        request_id=request_id,
        **{name: sum(getattr(report, name) for report in reports) for name in _COUNTS},
        batch_tokens=tuple(tokens for report in reports for tokens in report.batch_tokens),
        timings=_sum_timings(reports, total_ms=total_s * _MS),
        warnings=tuple(dict.fromkeys([*warnings, *(text for report in reports for text in report.warnings)])),
        token_ids=_join([None if p.report.token_ids is None else p.report.token_ids + p.start for p in parts]),
        expert_ids=_join([report.expert_ids for report in reports]),
        expert_weights=_join([report.expert_weights for report in reports]),
        outcomes=_join([report.outcomes for report in reports]),
        shared_weights=_join([report.shared_weights for report in reports]),
    )


def empty_report(
    request: LayerRequest, *, table_version: int, warnings: tuple[str, ...], num_shared: int = 0
) -> Report:
    """The report on a request without rows, to a layer with so many shared experts."""
    asked = request.return_routing
    return Report(
        request_id=request.request_id,
        layer=request.layer,
        table_version=table_version,
        num_tokens=0,
        num_assignments=0,
        num_served=0,
        num_dropped_capacity=0,
        num_dropped_failure=0,
        num_rerouted=0,
        warnings=warnings,
        token_ids=np.empty(0, np.int64) if asked else None,
        expert_ids=np.empty(0, np.int64) if asked else None,
        expert_weights=np.empty(0, np.float32) if asked else None,
        outcomes=np.empty(0, np.uint8) if asked else None,
        shared_weights=np.empty((0, num_shared), np.float32) if asked and num_shared else None,
    )


_COUNTS = tuple(field.name for field in fields(Report) if field.name.startswith("num_"))


def _sum_timings(reports: Sequence[Report], *, total_ms: float) -> Timings:
    stages = ("queue_ms", "gate_ms", "experts_ms", "combine_ms")
    return Timings(
        **{stage: sum(getattr(report.timings, stage) for report in reports) for stage in stages}, total_ms=total_ms
    )


def _join(arrays: Sequence[NDArray[ScalarT] | None]) -> NDArray[ScalarT] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
