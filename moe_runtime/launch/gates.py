"""A layer's gate, from its weights or its seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from moe_runtime.config.load import is_uri
from moe_runtime.experts.remote_files import check_uri
from moe_runtime.experts.weights import check_fit, load_into, load_weights
from moe_runtime.experts.weights_store import WeightsStore
from moe_runtime.routing.gates import build_gate

if TYPE_CHECKING:
    from moe_runtime.config.models import GateConfig
    from moe_runtime.routing.gates import Gate


def gate_seed(seed: int, layer: str) -> int:
    """The stream of the runtime's seed that initialises the gate of one layer."""
    # Layers of equal shape would otherwise start with equal gates.
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/gate".encode()).digest()[:7], "little")


def load_gate(
    config: GateConfig,
    *,
    weights: str | None,
    in_features: int,
    num_experts: int,
    seed: int,
    store: WeightsStore | None = None,
) -> Gate:
    """A float32 gate in eval mode.

    Args:
        config: The gate's block.
        weights: Absolute path or address of a safetensors file whose keys are the gate's parameters; None takes the
            seed.
        in_features: Width of the gate's input.
        num_experts: Experts of the layer.
        seed: Initialises the gate where there are no weights.
        store: Gives the file; without one, paths of this machine and addresses work.

    Raises:
        WeightsError: With one line per mistake: the file is missing, corrupt, or does not fit the gate.
    """
    gate = build_gate(config, in_features=in_features, num_experts=num_experts, seed=seed)
    if weights is not None:
        load_into(gate, load_weights((store or WeightsStore()).fetch(weights)).tensors)
    return gate.eval()


def check_gate_weights(config: GateConfig, *, weights: str, in_features: int, num_experts: int) -> None:
    """Check a gate's file as ``load_gate`` would, without allocating the gate; an address only for being there.

    Raises:
        WeightsError: With one line per mistake: the file is missing, corrupt, or does not fit the gate.
    """
    if is_uri(weights):
        check_uri(weights)
        return
    with torch.device("meta"):
        gate = build_gate(config, in_features=in_features, num_experts=num_experts, seed=0)
    check_fit(gate, load_weights(weights).tensors)
