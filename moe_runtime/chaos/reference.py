"""What the layer's answers must be: in float64, from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_runtime.chaos.layer import LayerWeights

#: Rows whose choice is closer than this may be routed either way by float32.
_CLEAR_LOGIT_GAP = 1e-4


@dataclass(frozen=True)
class Routing:
    """Assignments that were served, one entry each.

    Attributes:
        token_ids: Row of the request, int64 ``(n,)``.
        expert_ids: Expert, int64 ``(n,)``.
        weights: Weight applied to its output, ``(n,)``.
    """

    token_ids: NDArray[np.int64]
    expert_ids: NDArray[np.int64]
    weights: NDArray[np.floating]


class Reference:
    """The layer in one process, in numpy; shares no code with the runtime."""

    def __init__(self, weights: LayerWeights) -> None:
        """Keep the weights, widened."""
        self._gate = weights.gate.astype(np.float64)
        self._up, self._up_bias = weights.up.astype(np.float64), weights.up_bias.astype(np.float64)
        self._down, self._down_bias = weights.down.astype(np.float64), weights.down_bias.astype(np.float64)

    def outputs(self, inputs: NDArray[np.float32], served: Routing) -> NDArray[np.float64]:
        """The weighted sum of each row's served experts; the row itself where none served it.

        Args:
            inputs: ``(num_rows, features)``.
            served: The assignments that were served.
        """
        rows = inputs.astype(np.float64)
        sums = np.zeros_like(rows)
        for expert_id in range(len(self._gate)):
            mine = served.expert_ids == expert_id
            token_ids = served.token_ids[mine]
            np.add.at(sums, token_ids, served.weights[mine, None] * self._expert(expert_id, rows[token_ids]))
        is_served = np.zeros(len(rows), dtype=bool)
        is_served[served.token_ids] = True
        return np.where(is_served[:, None], sums, rows)

    def routing(self, inputs: NDArray[np.float32], k: NDArray[np.int64]) -> tuple[Routing, NDArray[np.bool_]]:
        """Where the gate sends each row, and which rows have a choice clear enough to count on.

        Args:
            inputs: ``(num_rows, features)``.
            k: Experts of each row, ``(num_rows,)``; 0 for rows that are masked.
        """
        logits = inputs.astype(np.float64) @ self._gate.T
        order = np.argsort(-logits, axis=1, kind="stable")
        ranked = np.take_along_axis(logits, order, axis=1)
        ranks = np.arange(logits.shape[1])
        is_chosen = ranks < k[:, None]
        scores = np.exp(ranked - ranked[:, :1])
        scores = np.where(is_chosen, scores, 0.0)
        weights = scores / np.maximum(scores.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        token_ids, chosen = np.nonzero(is_chosen)
        gaps = -np.diff(ranked, axis=1)
        is_clear = np.where(ranks[:-1] == k[:, None] - 1, gaps, np.inf).min(axis=1) > _CLEAR_LOGIT_GAP
        return Routing(token_ids, order[token_ids, chosen], weights[token_ids, chosen]), is_clear

    def _expert(self, expert_id: int, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        hidden = np.maximum(rows @ self._up[expert_id].T + self._up_bias[expert_id], 0.0)
        outputs: NDArray[np.float64] = hidden @ self._down[expert_id].T + self._down_bias[expert_id]
        return outputs
