"""Gates: the networks that score experts. First stage of a batch: gate -> policy -> capacity -> plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.config.gates import MLPGateConfig, NoisyGateConfig
from moe_runtime.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.gates import GateConfig

#: Added to the learned noise, so that exploration never stops (Shazeer et al. 2017).
MIN_NOISE_STD = 1e-2


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
    """

    #: Names of the tasks that it has a part for, in their order; none where it has one for all.
    tasks: tuple[str, ...] = ()
    #: The task of requests that name none; None refuses them.
    default_task: str | None = None

    expert_bias: Tensor | None
    shared_weight: nn.Parameter | None

    def __init__(self, shape: GateShape, *, init: torch.Generator, jitter_eps: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.jitter_eps = jitter_eps
        # A buffer: it moves by the experts' loads, never by a gradient.
        self.register_buffer("expert_bias", torch.zeros(shape.num_biases) if shape.num_biases else None)
        shared = _uniform_parameter((shape.num_shared, shape.in_features), shape.in_features, init)
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
            ShapeError: If the input is not ``(num_tokens, in_features)``.
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


class LinearGate(Gate):
    """``x @ weight.T (+ bias)``; parameters ``weight (num_logits, in_features)``, ``bias (num_logits,)``."""

    bias: nn.Parameter | None

    def __init__(self, shape: GateShape, *, init: torch.Generator, bias: bool, jitter_eps: float = 0.0) -> None:
        super().__init__(shape, init=init, jitter_eps=jitter_eps)
        self.weight = _uniform_parameter((shape.num_logits, shape.in_features), shape.in_features, init)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape.num_logits)) if bias else None)

    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits, without noise."""
        return F.linear(features, self.weight, self.bias)


class MLPGate(Gate):
    """Linear, ReLU, linear (Eigen, Ranzato, Sutskever 2013, https://arxiv.org/abs/1312.4314).

    Parameters: ``hidden_weight (hidden_features, in_features)``, ``hidden_bias (hidden_features,)``,
    ``weight (num_logits, hidden_features)`` and, with ``bias``, ``bias (num_logits,)``.
    """

    bias: nn.Parameter | None

    def __init__(
        self, shape: GateShape, *, init: torch.Generator, bias: bool, hidden_features: int, jitter_eps: float = 0.0
    ) -> None:
        super().__init__(shape, init=init, jitter_eps=jitter_eps)
        self.hidden_weight = _uniform_parameter((hidden_features, shape.in_features), shape.in_features, init)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_features))
        self.weight = _uniform_parameter((shape.num_logits, hidden_features), hidden_features, init)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape.num_logits)) if bias else None)

    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits, without noise."""
        hidden = F.relu(F.linear(features, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True)
class NoisyLogits:
    """What a noisy gate scored, and how uncertain it was; ``load_loss`` needs all three.

    Attributes:
        clean: Logits without noise, float32 ``(num_tokens, num_logits)``.
        noisy: Logits with noise, the ones to route by, same shape.
        noise_std: Standard deviation of the noise, same shape, above 0.
    """

    clean: Tensor
    noisy: Tensor
    noise_std: Tensor


class NoisyGate(LinearGate):
    """A linear gate; train mode adds ``N(0,1) * (softplus(x @ noise_weight.T) + 1e-2)`` to the logits.

    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2.1. ``noise_weight (num_logits,
    in_features)`` starts at 0. Eval mode adds nothing.
    """

    def __init__(self, shape: GateShape, *, init: torch.Generator, bias: bool, jitter_eps: float = 0.0) -> None:
        super().__init__(shape, init=init, bias=bias, jitter_eps=jitter_eps)
        self.noise_weight = nn.Parameter(torch.zeros(shape.num_logits, shape.in_features))

    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits, with noise in train mode."""
        if not self.training:
            return super().score(features, generator=generator, tasks=tasks)
        return self.noisy_logits(features, generator).noisy

    def noisy_logits(self, features: Tensor, generator: torch.Generator | None = None) -> NoisyLogits:
        """Logits with and without noise, in either mode and without jitter.

        Args:
            features: ``(num_tokens, in_features)`` of any float dtype.
            generator: Source of the noise, on the input's device; torch's default when None.

        Returns:
            Three float32 tensors of shape ``(num_tokens, num_logits)``.
        """
        features = features.float()
        clean = F.linear(features, self.weight, self.bias)
        noise_std = F.softplus(F.linear(features, self.noise_weight)) + MIN_NOISE_STD
        noise = torch.empty_like(clean).normal_(generator=generator)
        return NoisyLogits(clean=clean, noisy=clean + noise * noise_std, noise_std=noise_std)


def build_gate(config: GateConfig, shape: GateShape, *, seed: int) -> Gate:
    """A float32 gate, initialised from the seed alone; in train mode, as torch makes modules.

    Args:
        config: The gate's block; ``weights`` is not read here.
        shape: How wide it is.
        seed: The same seed gives the same parameters; torch's global generator is not touched.
    """
    init = torch.Generator().manual_seed(seed)
    if isinstance(config, MLPGateConfig):
        return MLPGate(
            shape, init=init, bias=config.bias, hidden_features=config.hidden_features, jitter_eps=config.jitter_eps
        )
    gate_class = NoisyGate if isinstance(config, NoisyGateConfig) else LinearGate
    return gate_class(shape, init=init, bias=config.bias, jitter_eps=config.jitter_eps)


def _uniform_parameter(shape: tuple[int, int], fan_in: int, init: torch.Generator) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=init))
