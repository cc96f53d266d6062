"""A layer whose gate prefers the first expert by far, until a bias moves it, and tokens to show that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_runtime.experts.weights import save_weights

NUM_EXPERTS = 4
EXPERTS = [{"name": f"e{i}", "kind": "identity"} for i in range(NUM_EXPERTS)]
#: The gate's logits are the tokens: two thirds or more of them prefer the first expert.
TOKENS = torch.randn(64, NUM_EXPERTS, generator=torch.Generator().manual_seed(5)) + torch.tensor([1.5, 0, 0, 0])


def skewed_layer(folder: Path, **balance: Any) -> dict[str, Any]:
    """A layer of identity experts, balanced while it serves; its gate's weights are put into a folder."""
    path = folder / "gate.safetensors"
    save_weights(path, {"weight": torch.eye(NUM_EXPERTS), "expert_bias": torch.zeros(NUM_EXPERTS)})
    return {
        "item_shape": [NUM_EXPERTS],
        "experts": EXPERTS,
        "gate": {"kind": "linear", "weights": str(path)},
        "policy": {"kind": "top_k", "k": 1, "score": "sigmoid", "expert_bias": True},
        "balance": {"online_bias": True, "rate": 0.02, "interval_s": 0.1, "min_assignments": 64, **balance},
    }
