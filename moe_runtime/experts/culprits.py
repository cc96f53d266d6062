"""Which rows made a forward fail: the rest is served, at the cost of some more forwards."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_runtime.experts.device_stage import Forwarded


class Failure(NamedTuple):
    """A forward that gave nothing.

    Attributes:
        error: What went wrong, in words.
        compute_ms: How long it took to.
        cause: What was raised, if anything was.
        is_fault: Whether the expert answered, but not as its contract says.
    """

    error: str
    compute_ms: float
    cause: BaseException | None = None
    is_fault: bool = False


class FailedRows(NamedTuple):
    """Rows ``start`` to ``stop`` of a forward, and what is wrong with them."""

    start: int
    stop: int
    failure: Failure


def salvage(
    rows: Tensor,
    failure: Failure,
    *,
    forward: Callable[[Tensor], Forwarded | Failure],
    outputs: Tensor,
    is_late: Callable[[], bool],
) -> list[FailedRows]:
    """Run a forward that failed again in halves, and those that fail in halves, until the culprits are alone.

    The largest pieces come first, so that what is served when the search ends early is as much as can be. An expert
    that always fails must not cost a forward per row: after ``4 log2(num_rows) + 16`` forwards, or when the answers
    are no longer awaited, rows that have not been tried apart from a culprit fail as it does.

    Args:
        rows: What the forward was given, ``(num_rows, *in_shape)``.
        failure: How it failed.
        forward: Runs some of the rows.
        outputs: Takes what could be served, ``(num_rows, *out_shape)``; left as it is where a row failed.
        is_late: Whether nobody waits for the rows any more.

    Returns:
        What failed, in no order.
    """
    forwards_left = 4 * (rows.shape[0] - 1).bit_length() + 16
    failed: list[FailedRows] = []
    suspects = deque([FailedRows(0, rows.shape[0], failure)])
    while suspects:
        suspect = suspects.popleft()
        start, stop, _ = suspect
        middle = (start + stop) // 2
        if middle == start or forwards_left < 2 or is_late():
            failed.append(suspect)
            continue
        forwards_left -= 2
        for half in (slice(start, middle), slice(middle, stop)):
            result = forward(rows[half])
            if isinstance(result, Failure):
                suspects.append(FailedRows(half.start, half.stop, result))
            else:
                outputs[half] = result.rows
    return failed
