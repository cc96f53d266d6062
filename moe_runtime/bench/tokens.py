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
    num_tokens, k = choices.shape
    wanted = torch.zeros(num_tokens, gate_weight.shape[0], dtype=torch.float64)
    wanted.scatter_(1, choices, torch.linspace(2.0, 1.0, k, dtype=torch.float64).expand(num_tokens, k))
    return tokens_with_logits(gate_weight, wanted, seed=seed)


def tokens_with_logits(gate_weight: Tensor, logits: Tensor, *, seed: int = 0) -> Tensor:
    """Random tokens of which a linear gate makes given router logits, up to rounding.

    Args:
        gate_weight: The linear gate's, ``(num_experts, features)``, with independent rows.
        logits: ``(num_tokens, num_experts)``.
        seed: Of what the gate does not see.

    Returns:
        Float32 ``(num_tokens, features)``.
    """
    weight = gate_weight.detach().double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(logits), weight.shape[1], generator=generator, dtype=torch.float64)
    correction = torch.linalg.lstsq(weight, (logits.double() - noise @ weight.T).T).solution.T
    tokens: Tensor = noise + correction
    return tokens.float()


def spread_evenly(num_tokens: int, *, num_experts: int, k: int = 2) -> Tensor:
    """Choices that touch every expert equally often, as far as the numbers allow, int64 ``(num_tokens, k)``."""
    return (torch.arange(num_tokens * k) % num_experts).reshape(num_tokens, k)
