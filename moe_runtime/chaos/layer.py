"""The layer that a run serves: known weights, the configuration, and what its answers must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_runtime.chaos.arming import PLUG_IN
from moe_runtime.chaos.faulty_expert import KIND_NAME
from moe_runtime.experts.weights import save_weights, write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LAYER = "layer"
NUM_EXPERTS, NUM_REPLICAS, NUM_ROUTERS = 3, 2, 2
NUM_FEATURES, HIDDEN_FEATURES = 32, 64
TOP_K = 2
MAX_ROWS = 512
#: Small enough for a flood to fill it, large enough for all clients' largest requests.
MAX_QUEUED_TOKENS = 16 * MAX_ROWS
#: Of a batch, from its dispatch.
LAYER_TIMEOUT_MS = 2000.0


@dataclass(frozen=True)
class LayerWeights:
    """Every parameter of the layer, float32.

    Attributes:
        gate: ``(num_experts, features)``.
        up: ``(num_experts, hidden, features)``.
        up_bias: ``(num_experts, hidden)``.
        down: ``(num_experts, features, hidden)``.
        down_bias: ``(num_experts, features)``.
    """

    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    up_bias: NDArray[np.float32]
    down: NDArray[np.float32]
    down_bias: NDArray[np.float32]


def draw_weights(seed: int) -> LayerWeights:
    """Weights from a seed, scaled so that outputs are as large as inputs."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    features, hidden = NUM_FEATURES, HIDDEN_FEATURES
    return LayerWeights(
        gate=normal(NUM_EXPERTS, features, scale=features**-0.5),
        up=normal(NUM_EXPERTS, hidden, features, scale=features**-0.5),
        up_bias=normal(NUM_EXPERTS, hidden, scale=0.1),
        down=normal(NUM_EXPERTS, features, hidden, scale=hidden**-0.5),
        down_bias=normal(NUM_EXPERTS, features, scale=0.1),
    )


def write_weights(folder: Path, weights: LayerWeights) -> None:
    """Write the gate's and the experts' files, with their manifest, into a folder."""
    save_weights(folder / "gate.safetensors", {"weight": torch.from_numpy(weights.gate)})
    for index in range(NUM_EXPERTS):
        tensors = {
            "feed_forward.up.weight": weights.up[index],
            "feed_forward.up.bias": weights.up_bias[index],
            "feed_forward.down.weight": weights.down[index],
            "feed_forward.down.bias": weights.down_bias[index],
        }
        save_weights(
            folder / f"expert-{index}.safetensors",
            {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()},
        )
    write_manifest(folder)


def chaos_config(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of a run: one layer, on weights that lie in a folder.

    Args:
        name: Of the runtime.
        folder: Where ``write_weights`` wrote.
    """
    experts = {
        "kind": KIND_NAME,
        "count": NUM_EXPERTS,
        "replicas": NUM_REPLICAS,
        "weights": str(folder / "expert-{i}.safetensors"),
        "options": {"hidden_features": HIDDEN_FEATURES},
    }
    return {
        "name": name,
        "device": "cpu",
        "plug_ins": [PLUG_IN],
        "threads": 1,
        "start_timeout_s": 120.0,
        "router": {"address": "127.0.0.1:0", "replicas": NUM_ROUTERS, "max_queued_tokens": MAX_QUEUED_TOKENS},
        "layers": {
            LAYER: {
                "item_shape": [NUM_FEATURES],
                "gate": {"kind": "linear", "weights": str(folder / "gate.safetensors")},
                "policy": {"kind": "top_k", "k": TOP_K},
                "residual": "passthrough",
                "timeout_ms": LAYER_TIMEOUT_MS,
                "hedge": {"quantile": 0.99, "times": 2.0, "max_share": 0.05},
                "experts": [experts],
            }
        },
    }
