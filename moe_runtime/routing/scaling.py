"""Scaling of a batch's scores to equal loads: what Sinkhorn selects by, and where an auction's prices start."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: A score further below its token's best one counts as so far below: every scaling of the matrix stays within float64.
LARGEST_GAP = 300.0


def gaps_to_best(scores: Tensor) -> Tensor:
    """Scores less the best one of each token, 0 to ``-LARGEST_GAP``, ``(num_tokens, num_experts)``."""
    return (scores - scores.amax(dim=1, keepdim=True)).clamp_min(-LARGEST_GAP)


def scale_columns(matrix: Tensor, *, tolerance: float, max_iterations: int) -> Tensor:
    """Factors of the columns with which, rows being scaled to sum 1, all columns have the same sum.

    Args:
        matrix: Positive, float64 ``(num_rows, num_columns)``; the largest number of a row is 1, the smallest at least
            ``exp(-LARGEST_GAP)``.
        tolerance: Share of their mean by which the columns' sums may differ from it.
        max_iterations: Rounds of scaling at most.

    Returns:
        float64 ``(num_columns,)``, above 0 and finite.
    """
    num_rows, num_columns = matrix.shape
    mean = num_rows / num_columns
    factors = matrix.new_ones(num_columns)
    for _ in range(max_iterations):
        sums = matrix.t() @ (1.0 / (matrix @ factors))
        if float((factors * sums / mean - 1.0).abs().max()) < tolerance:
            break
        factors = mean / sums
    return factors
