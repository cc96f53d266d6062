"""Tokens that a linear gate sends where a benchmark wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def tokens_for(gate_weight: Tensor, choices: Tensor, *, seed: int = 0) -> Tensor:
    """Random tokens whose router logits are highest for the experts that are asked for.

    Args:
        gate_weight: The linear gate's, ``(num_experts, features)``, with independent rows.
        choices: Int64 ``(num_tokens, k)``: distinct experts per token, the first one preferred.
        seed: Of what the gate does not see.

    Returns:
        Float32 ``(num_tokens, features)``.
    """
    weight = gate_weight.detach().double()
    num_tokens, k = choices.shape
    noise = torch.randn(num_tokens, weight.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.zeros(num_tokens, weight.shape[0], dtype=torch.float64)
    wanted.scatter_(1, choices, torch.linspace(2.0, 1.0, k, dtype=torch.float64).expand(num_tokens, k))
    correction = torch.linalg.lstsq(weight, (wanted - noise @ weight.T).T).solution.T
    tokens: Tensor = noise + correction
    return tokens.float()


def spread_evenly(num_tokens: int, *, num_experts: int, k: int = 2) -> Tensor:
    """Choices that touch every expert equally often, as far as the numbers allow, int64 ``(num_tokens, k)``."""
    return (torch.arange(num_tokens * k) % num_experts).reshape(num_tokens, k)
