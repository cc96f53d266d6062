"""The distribution over experts that a gate's logits stand for: shared by the losses and the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.routing.policy import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

#: How logits become scores, of which the probabilities are the shares.
ProbabilityScore = Literal["softmax", "sigmoid"]


def log_probabilities(router_logits: Tensor, *, score: ProbabilityScore = "softmax") -> Tensor:
    """Natural logarithms of each token's probabilities over experts; their exponentials sum to 1 per token.

    Args:
        router_logits: ``(num_tokens, num_experts)`` of any float dtype.
        score: ``softmax`` of the logits; or ``sigmoid`` of each logit, divided by their sum (DeepSeek-V3,
            https://arxiv.org/abs/2412.19437, eq. 19).

    Returns:
        ``(num_tokens, num_experts)``, finite, at least float32.
    """
    logits = at_least_float32(router_logits)
    # sigmoid(x) / sum(sigmoid(x)) is the softmax of log(sigmoid(x)), which does not underflow.
    logs = torch.log_softmax(F.logsigmoid(logits) if score == "sigmoid" else logits, dim=-1)
    # Finite: the logarithm of a chance that underflows may be -inf, whose product with it would be NaN.
    return logs.clamp_min(torch.finfo(logs.dtype).min)
