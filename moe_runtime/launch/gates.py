"""A layer's gate, from its weights or its seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from moe_runtime.config.load import is_uri
from moe_runtime.experts.remote_files import check_uri
from moe_runtime.experts.weights import check_fit, load_into, load_weights
from moe_runtime.experts.weights_store import WeightsStore
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from moe_runtime.config.gates import GateConfig
    from moe_runtime.config.models import SharedGate
    from moe_runtime.routing.gate import Gate
    from moe_runtime.routing.policy import Policy


def gate_shape(policy: Policy, *, in_features: int, num_shared: int, shared_gate: SharedGate) -> GateShape:
    """How wide the gate of a layer is.

    Args:
        policy: The layer's.
        in_features: Width of the gate's input.
        num_shared: Shared experts of the layer.
        shared_gate: What their weight is; the gate scores it unless it is 1.
    """
    num_biases = policy.num_experts if policy.uses_bias else 0
    num_gated = 0 if shared_gate == "none" else num_shared
    return GateShape(in_features, policy.num_logits, num_biases=num_biases, num_shared=num_gated)


def gate_seed(seed: int, layer: str) -> int:
    """The stream of the runtime's seed that initialises the gate of one layer."""
    # Layers of equal shape would otherwise start with equal gates.
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/gate".encode()).digest()[:7], "little")


def load_gate(
    config: GateConfig,
    shape: GateShape,
    *,
    weights: str | None,
    seed: int,
    store: WeightsStore | None = None,
) -> Gate:
    """A float32 gate in eval mode.

    Args:
        config: The gate's block.
        shape: How wide it is.
        weights: Absolute path or address of a safetensors file whose keys are the gate's parameters and, where it has
            one, ``expert_bias``, which is zeros in a file without; None takes the seed.
        seed: Initialises the gate where there are no weights.
        store: Gives the file; without one, paths of this machine and addresses work.

    Raises:
        WeightsError: With one line per mistake: the file is missing, corrupt, or does not fit the gate.
    """
    gate = build_gate(config, shape, seed=seed)
    if weights is not None:
        load_into(gate, _tensors((store or WeightsStore()).fetch(weights), shape))
    return gate.eval()


def check_gate_weights(config: GateConfig, shape: GateShape, *, weights: str) -> None:
    """Check a gate's file as ``load_gate`` would, without allocating the gate; an address only for being there.

    Raises:
        WeightsError: With one line per mistake: the file is missing, corrupt, or does not fit the gate.
    """
    if is_uri(weights):
        check_uri(weights)
        return
    with torch.device("meta"):
        gate = build_gate(config, shape, seed=0)
    check_fit(gate, _tensors(weights, shape))


def _tensors(weights: str | Path, shape: GateShape) -> Mapping[str, Tensor]:
    tensors = load_weights(weights).tensors
    if not shape.num_biases or "expert_bias" in tensors:
        return tensors
    # Routers that were trained without a bias have none in their files.
    return {**tensors, "expert_bias": torch.zeros(shape.num_biases)}
