"""What a host says of each call: its rows, those of them that failed, and why."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_runtime.errors import InnerLayerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moe_runtime.experts.culprits import FailedRows


class ExpertOutcome(NamedTuple):
    """How one call went.

    Attributes:
        rows: ``(num_rows, *out_shape)``, contiguous, in the wire's dtype, on the CPU; or None if there is an
            error that costs all of them. May share memory with the call's rows.
        error: None, or what went wrong, in words.
        compute_ms: Time that the product took that these rows were part of, with those of merged calls.
        failed_rows: Where there are rows and an error: the rows that it costs, ascending; they are zeros.
        is_expert_error: Whether the expert itself made the error, from these rows: it raised, or its output cannot be
            used. False where it was not asked, or another layer that it asked has failed.
    """

    rows: Tensor | None
    error: str | None
    compute_ms: float
    failed_rows: tuple[int, ...] = ()
    is_expert_error: bool = False


def outcomes_of(
    sizes: Sequence[int], rows: Tensor, failed: Sequence[FailedRows], *, compute_ms: float
) -> list[ExpertOutcome]:
    """The outcomes of calls that were merged into one forward, some of whose rows failed.

    An error that is the expert's fault costs its call all rows; another, those that failed.

    Args:
        sizes: Rows of each call, in order.
        rows: Output of the forward, ``(sum of sizes, *out_shape)``; anything where a row failed.
        failed: Which rows did; no row twice.
        compute_ms: Time that it took.
    """
    failed = sorted(failed, key=lambda each: each.start)
    starts, stops = [each.start for each in failed], [each.stop for each in failed]
    outcomes = []
    start = 0
    for size in sizes:
        stop = start + size
        own = failed[bisect_right(stops, start) : bisect_left(starts, stop)]
        clipped = [
            each._replace(start=max(each.start, start) - start, stop=min(each.stop, stop) - start) for each in own
        ]
        outcomes.append(_outcome(rows[start:stop], clipped, compute_ms))
        start = stop
    return outcomes


def _outcome(rows: Tensor, failed: Sequence[FailedRows], compute_ms: float) -> ExpertOutcome:
    if not failed:
        return ExpertOutcome(rows, None, compute_ms)
    fault = next((each.failure.error for each in failed if each.failure.is_fault), None)
    error = fault or failed[0].failure.error
    is_own = not any(isinstance(each.failure.cause, InnerLayerError) for each in failed)
    numbers = [number for each in failed for number in range(each.start, each.stop)]
    if fault is not None or len(numbers) == len(rows):
        return ExpertOutcome(None, error, compute_ms, is_expert_error=is_own)
    # Not in place: an output may lie in the memory of the call's rows, or of the expert's parameters.
    zeroed = rows.index_fill(0, torch.tensor(numbers), 0)
    error = f"{error}, in {len(numbers)} of {len(rows)} rows"
    return ExpertOutcome(zeroed, error, compute_ms, tuple(numbers), is_expert_error=is_own)
