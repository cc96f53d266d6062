"""The gate for several tasks: one linear gate per task, over one pool of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.gate import Gate, GateShape, uniform_parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: Tasks that a message names.
_MAX_NAMED = 8


class MultiGate(Gate):
    """One linear gate per task (MMoE, https://dl.acm.org/doi/10.1145/3219819.3220007).

    Parameters: ``weight (num_tasks, num_logits, in_features)`` and, with ``bias``, ``bias (num_tasks, num_logits)``.

    Args:
        shape: How wide each of them is.
        tasks: Names of the tasks, in the order of the parameters.
        default_task: Task of a batch that names none; one of ``tasks``.
        init: Initialises its parameters.
        bias: Whether each gate has a learned bias per expert.
        jitter_eps: As in ``Gate``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: GateShape,
        *,
        tasks: Sequence[str],
        default_task: str | None = None,
        init: torch.Generator,
        bias: bool,
        jitter_eps: float = 0.0,
    ) -> None:
        super().__init__(shape, init=init, jitter_eps=jitter_eps)
        self.tasks, self.default_task = tuple(tasks), default_task
        per_task = (shape.num_logits, shape.in_features)
        self.weight = uniform_parameter((len(self.tasks), *per_task), shape.in_features, init)
        self.register_parameter("bias", nn.Parameter(torch.zeros(len(self.tasks), shape.num_logits)) if bias else None)

    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits, each row by the gate of its own task."""
        if tasks is None:
            return self._logits([self._default_task_id()], [features])
        self._check_tasks(tasks, num_tokens=features.shape[0])
        # One product per task that occurs: a weight matrix per row would be (num_tokens, num_logits, in_features).
        present, counts = torch.unique(tasks, return_counts=True)
        if len(present) <= 1:
            return self._logits(present.tolist() or [0], [features])
        order = torch.argsort(tasks, stable=True)
        grouped = self._logits(present.tolist(), torch.split(features[order], counts.tolist()))
        return grouped[torch.argsort(order)]

    def _logits(self, tasks: Sequence[int], groups: Sequence[Tensor]) -> Tensor:
        """Logits of groups of rows, one group after the other, each by the gate of its task."""
        # Unbound for a gradient: that of each weight[task] would be as large as the gates of all tasks.
        learns = torch.is_grad_enabled()
        weights = self.weight.unbind() if learns else self.weight
        biases = self.bias.unbind() if learns and self.bias is not None else self.bias
        parts = [
            F.linear(rows, weights[task], None if biases is None else biases[task])
            for task, rows in zip(tasks, groups, strict=True)
        ]
        return torch.cat(parts)

    def _default_task_id(self) -> int:
        if self.default_task is None:
            raise InvalidRequestError(
                f"gate: expected the task of each token, one of {_some(self.tasks)}, found none; name one, or set the "
                f"gate's default_task"
            )
        return self.tasks.index(self.default_task)

    def _check_tasks(self, tasks: Tensor, *, num_tokens: int) -> None:
        if tasks.shape != (num_tokens,):
            raise ShapeError(f"tasks: expected one per token, shape ({num_tokens},), found {tuple(tasks.shape)}")
        if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool:
            raise InvalidRequestError(f"tasks: expected integers, found {tasks.dtype}")
        if num_tokens and (int(tasks.min()) < 0 or int(tasks.max()) >= len(self.tasks)):
            raise InvalidRequestError(
                f"tasks: expected places in the gate's {len(self.tasks)} tasks, 0 to {len(self.tasks) - 1}, found "
                f"{int(tasks.min())} to {int(tasks.max())}"
            )


def _some(names: tuple[str, ...]) -> str:
    listed = ", ".join(repr(name) for name in names[:_MAX_NAMED])
    return listed if len(names) <= _MAX_NAMED else f"{listed} and {len(names) - _MAX_NAMED} more"
