"""The kinds of gate for one task, and how a configuration block becomes a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.config.gates import CosineGateConfig, MLPGateConfig, MultiGateConfig, NoisyGateConfig
from moe_runtime.routing.gate import Gate, GateShape, uniform_parameter
from moe_runtime.routing.multi_gate import MultiGate

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.gates import GateConfig

#: Added to the learned noise, so that exploration never stops (Shazeer et al. 2017).
MIN_NOISE_STD = 1e-2

# Prototypes that are multiplied at once.
_BLOCK = 16


class LinearGate(Gate):
    """``x @ weight.T (+ bias)``; parameters ``weight (num_logits, in_features)``, ``bias (num_logits,)``."""

    bias: nn.Parameter | None

    def __init__(self, shape: GateShape, *, init: torch.Generator, bias: bool, jitter_eps: float = 0.0) -> None:
        super().__init__(shape, init=init, jitter_eps=jitter_eps)
        self.weight = uniform_parameter((shape.num_logits, shape.in_features), shape.in_features, init)
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
        self.hidden_weight = uniform_parameter((hidden_features, shape.in_features), shape.in_features, init)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_features))
        self.weight = uniform_parameter((shape.num_logits, hidden_features), hidden_features, init)
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


class CosineGate(Gate):
    """Cosine similarity of the input to a learned prototype per expert, over a temperature, plus a bias if any.

    X-MoE (https://arxiv.org/abs/2204.09179), without its projection to fewer features. Parameters: the prototypes,
    ``weight (num_logits, in_features)``, and with ``bias``, ``bias (num_logits,)``. Neither the length of the input
    nor that of a prototype counts; a row of zeros is similar to none, 0 for all. An expert joins a running layer by a
    row more: the logits of the others stay as they are, to the bit.
    """

    bias: nn.Parameter | None

    def __init__(
        self, shape: GateShape, *, init: torch.Generator, bias: bool, temperature: float, jitter_eps: float = 0.0
    ) -> None:
        super().__init__(shape, init=init, jitter_eps=jitter_eps)
        self.temperature = temperature
        self.weight = uniform_parameter((shape.num_logits, shape.in_features), shape.in_features, init)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape.num_logits)) if bias else None)

    def score(self, features: Tensor, *, generator: torch.Generator | None, tasks: Tensor | None) -> Tensor:
        """Router logits, without noise."""
        scaled, num_logits = _scaled(features), self.shape.num_logits
        # Products of one width whatever the number of experts: kernels choose the order of their sums by the width.
        padded = _scaled(F.pad(self.weight, (0, 0, 0, -num_logits % _BLOCK)))
        blocks = [F.linear(scaled, prototypes / _lengths(prototypes)) for prototypes in torch.split(padded, _BLOCK)]
        logits = torch.cat(blocks, dim=1)[:, :num_logits] / (_lengths(scaled) * self.temperature)
        return logits if self.bias is None else logits + self.bias


def build_gate(config: GateConfig, shape: GateShape, *, seed: int) -> Gate:
    """A float32 gate, initialised from the seed alone; in train mode, as torch makes modules.

    Args:
        config: The gate's block; ``weights`` is not read here.
        shape: How wide it is.
        seed: The same seed gives the same parameters; torch's global generator is not touched.
    """
    init, bias, jitter_eps = torch.Generator().manual_seed(seed), config.bias, config.jitter_eps
    match config:
        case MLPGateConfig(hidden_features=hidden_features):
            return MLPGate(shape, init=init, bias=bias, hidden_features=hidden_features, jitter_eps=jitter_eps)
        case CosineGateConfig(temperature=temperature):
            return CosineGate(shape, init=init, bias=bias, temperature=temperature, jitter_eps=jitter_eps)
        case MultiGateConfig(tasks=tasks, default_task=default):
            return MultiGate(shape, tasks=tasks, default_task=default, init=init, bias=bias, jitter_eps=jitter_eps)
    gate_class = NoisyGate if isinstance(config, NoisyGateConfig) else LinearGate
    return gate_class(shape, init=init, bias=bias, jitter_eps=jitter_eps)


def _scaled(rows: Tensor) -> Tensor:
    """Rows in the same directions whose largest number is 1; rows of zeros, or as good as that, as they are."""
    # The square of a large number overflows, and that of a tiny one vanishes.
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    return rows / torch.where(largest < torch.finfo(rows.dtype).tiny, 1.0, largest)


def _lengths(rows: Tensor) -> Tensor:
    """Lengths of scaled rows, ``(num_rows, 1)``; 1 for a row of zeros, which stays one when it is divided."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(lengths == 0, 1.0, lengths)
