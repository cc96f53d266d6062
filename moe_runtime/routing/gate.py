"""What every gate is, a network that scores experts. First stage of a batch: gate -> policy -> capacity -> plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GateShape:
    """How wide a gate is.

    Attributes:
        in_features: Width of its input.
        num_logits: Width of its output; what the layer's policy asks for, the number of experts as a rule.
        num_biases: Experts that are selected by a bias too; the gate keeps it, ``expert_bias (num_biases,)``.
        num_shared: Shared experts whose weight it scores, by ``shared_weight (num_shared, in_features)``.
    """

    in_features: int
    num_logits: int
    num_biases: int = 0
    num_shared: int = 0


class Gate(nn.Module, ABC):
    """Scores every expert for every token, in float32 whatever the dtype of the tokens.

    float32, and never autocast: ties between bfloat16 scores make the choice depend on the batch.

    Args:
        shape: How wide it is.
        jitter_eps: In train mode the gate's copy of the input is multiplied by U[1-eps, 1+eps]
            (Switch Transformers, https://arxiv.org/abs/2101.03961); 0 is none.
        init: Initialises its parameters.

    Attributes:
        tasks: Names of the tasks, for a gate with one part per task; a token's task is a place in them.
        default_task: Task of tokens that name none; None where they must.
    """

    tasks: tuple[str, ...] = ()
    default_task: str | None = None
    expert_bias: Tensor | None
    shared_weight: nn.Parameter | None

    def __init__(self, shape: GateShape, *, init: torch.Generator, jitter_eps: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.jitter_eps = jitter_eps
        # A buffer: it moves by the experts' loads, never by a gradient.
        self.register_buffer("expert_bias", torch.zeros(shape.num_biases) if shape.num_biases else None)
        shared = uniform_parameter((shape.num_shared, shape.in_features), shape.in_features, init)
        self.register_parameter("shared_weight", shared if shape.num_shared else None)

    def forward(
        self, gate_input: Tensor, generator: torch.Generator | None = None, *, tasks: Tensor | None = None
    ) -> Tensor:
        """Router logits of a batch; deterministic in eval mode.

        Args:
            gate_input: ``(num_tokens, in_features)`` of any float dtype; never changed.
            generator: Source of jitter and noise in train mode, on the input's device; torch's default
                when None.
            tasks: int64 ``(num_tokens,)``: the task of each token, for a gate that has one part per task.

        Returns:
            ``(num_tokens, num_logits)``, float32.

        Raises:
            ShapeError: If the input is not ``(num_tokens, in_features)``, or ``tasks`` not ``(num_tokens,)``.
            InvalidRequestError: If the gate has tasks, and a token's is missing or none of them.
        """
        self._check(gate_input)
        if not torch.is_autocast_enabled(gate_input.device.type):
            return self.score(self._jittered(gate_input.float(), generator), generator=generator, tasks=tasks)
        with torch.autocast(gate_input.device.type, enabled=False):
            return self.score(self._jittered(gate_input.float(), generator), generator=generator, tasks=tasks)

    @abstractmethod
    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits ``(num_tokens, num_logits)`` of float32 features ``(num_tokens, in_features)``."""

    def shared_weights(self, gate_input: Tensor) -> Tensor:
        """Weights of the shared experts, ``sigmoid(x @ shared_weight.T)``, float32 ``(num_tokens, num_shared)``.

        Qwen2-MoE, https://arxiv.org/abs/2407.10671.

        Args:
            gate_input: ``(num_tokens, in_features)`` of any float dtype.

        Raises:
            ShapeError: If the input is not ``(num_tokens, in_features)``.
        """
        self._check(gate_input)
        if self.shared_weight is None:
            return gate_input.new_ones((gate_input.shape[0], 0), dtype=torch.float32)
        with torch.autocast(gate_input.device.type, enabled=False):
            return torch.sigmoid(F.linear(gate_input.float(), self.shared_weight))

    def _check(self, gate_input: Tensor) -> None:
        if gate_input.dim() != 2 or gate_input.shape[1] != self.shape.in_features:
            raise ShapeError(
                f"gate: expected an input of shape (num_tokens, {self.shape.in_features}), "
                f"found {tuple(gate_input.shape)}"
            )

    def _jittered(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.jitter_eps == 0.0:
            return features
        factors = torch.empty_like(features).uniform_(1.0 - self.jitter_eps, 1.0 + self.jitter_eps, generator=generator)
        return features * factors


def uniform_parameter(shape: tuple[int, ...], fan_in: int, init: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U[-1/sqrt(fan_in), 1/sqrt(fan_in)], as torch initialises linear layers."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=init))
