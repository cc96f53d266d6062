"""The policies that the demo rolls through, and the gate that each is given from the one that was trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.routing.expert_bias import update_bias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

#: Places per expert, over what an even load asks for.
CAPACITY_FACTOR = 1.25
#: Of the controller that balances the selection bias on the training images: its steps and their size.
_BIAS_STEPS, _BIAS_RATE = 300, 5e-3


@dataclass(frozen=True)
class TrainedGate:
    """What the demo has of the trained layer's linear gate.

    Attributes:
        weight: ``(num_experts, 64)``.
        training_pixels: The images that a selection bias is balanced on, ``(num_images, 64)``.
    """

    weight: Tensor
    training_pixels: Tensor

    def logits(self, pixels: Tensor) -> Tensor:
        """Router logits of images, ``(num_images, num_experts)``."""
        return pixels @ self.weight.T


@dataclass(frozen=True)
class PolicyGate:
    """The gate of one policy.

    Attributes:
        tensors: Its weight file; empty where the policy asks no gate.
        inputs: What requests give it instead of the pixels, from the trained gate's logits; None is the pixels.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class DemoPolicy:
    """One policy of the demo.

    Attributes:
        name: Its kind, and what is special.
        block: Its block of the configuration.
        gate: Makes its gate from the trained one.
        sets_capacity: Whether it decides itself how many tokens an expert gets.
    """

    name: str
    block: Mapping[str, Any]
    gate: Callable[[TrainedGate], PolicyGate]
    sets_capacity: bool = False


def trained(gate: TrainedGate) -> PolicyGate:
    """The trained gate itself."""
    return PolicyGate({"weight": gate.weight})


def no_gate(_: TrainedGate) -> PolicyGate:
    """Nothing: the policy asks no gate."""
    return PolicyGate()


def with_bias(gate: TrainedGate) -> PolicyGate:
    """The trained gate with a selection bias, balanced on the training images as DeepSeek-V3 does it."""
    scores = torch.sigmoid(gate.logits(gate.training_pixels))
    bias = torch.zeros(len(gate.weight))
    for _ in range(_BIAS_STEPS):
        chosen = torch.topk(scores + bias, 2, dim=1).indices
        bias = update_bias(bias, torch.bincount(chosen.flatten(), minlength=len(bias)), rate=_BIAS_RATE)
    return PolicyGate({"weight": gate.weight, "expert_bias": bias})


def in_two_levels(gate: TrainedGate) -> PolicyGate:
    """A gate that passes on what it is given: the trained logits, with those of the first level before them.

    The first expert is the shared one, and the others together have the highest of their logits: an image goes to the
    shared expert if the trained gate likes it best.
    """
    return PolicyGate({"weight": torch.eye(1 + len(gate.weight))}, inputs=two_level_logits)


def two_level_logits(logits: Tensor) -> Tensor:
    """``[shared, others, expert 1, expert 2, ...]`` of plain router logits, ``(num_tokens, 1 + num_experts)``."""
    return torch.cat([logits[:, :1], logits[:, 1:].amax(1, keepdim=True), logits[:, 1:]], dim=1)


#: Policies that differ in evaluation do here as in training: the demo is about how they spread tokens.
POLICIES = (
    DemoPolicy("dense", {"kind": "dense"}, trained),
    DemoPolicy("top_k", {"kind": "top_k", "k": 2}, trained),
    DemoPolicy("top_k, bias", {"kind": "top_k", "k": 2, "score": "sigmoid", "expert_bias": True}, with_bias),
    DemoPolicy("switch", {"kind": "switch"}, trained),
    DemoPolicy("gshard_top2", {"kind": "gshard_top2", "second_in_evaluation": "proportional"}, trained),
    DemoPolicy("sparsemixer", {"kind": "sparsemixer"}, trained),
    DemoPolicy("hierarchical", {"kind": "hierarchical", "mode": "shared_first", "k": 2}, in_two_levels),
    DemoPolicy("expert_choice", {"kind": "expert_choice"}, trained, sets_capacity=True),
    DemoPolicy("global_assignment", {"kind": "global_assignment", "evaluation": "as_in_training"}, trained),
    DemoPolicy("sinkhorn", {"kind": "sinkhorn", "k": 2, "evaluation": "as_in_training"}, trained),
    DemoPolicy("hash", {"kind": "hash", "k": 2}, no_gate),
    DemoPolicy("random", {"kind": "random", "k": 2}, no_gate),
    DemoPolicy("round_robin", {"kind": "round_robin", "k": 2}, no_gate),
    DemoPolicy("reinforce", {"kind": "reinforce", "k": 2, "evaluation": "as_in_training"}, trained),
)
