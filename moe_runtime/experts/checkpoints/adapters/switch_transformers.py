"""Switch Transformers: experts as modules in a dictionary, one per token, and a capacity that drops tokens.

The router gives a mask; the row of a token beyond its expert's capacity is all zero. Such a token does not travel, and
adds nothing to its residual, as in the model (https://arxiv.org/abs/2101.03961).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_runtime.experts.checkpoints.adapters.loops import is_of
from moe_runtime.experts.checkpoints.families import Family, ParameterRows, RowsOf

if TYPE_CHECKING:
    from collections.abc import Mapping

_MATRICES = ("wi.weight", "wo.weight")


class SwitchTransformersFamily(Family):
    """``SwitchTransformersExperts``."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="switch_transformers", name="SwitchTransformersExperts")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.num_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module["expert_0"].wi.in_features)

    def parameters(self, module: Any, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        return {name: ParameterRows(f"expert_{expert}.{name}") for name in _MATRICES}

    def single(self, module: Any) -> nn.Module:
        """See the base class. It is the model's own module of one expert; its dropout is off in eval mode."""
        one: nn.Module = copy.deepcopy(module["expert_0"])
        return one.requires_grad_(False).eval()

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
            mask = selected_experts.flatten(0, 1)
            kept = mask.any(dim=1).nonzero().squeeze(1)
            outputs = torch.zeros_like(hidden_states)
            if len(kept):
                found = rows(hidden_states[kept], mask[kept].argmax(dim=1, keepdim=True))
                outputs[kept] = (found * routing_weights[kept]).to(outputs.dtype)
            return outputs

        module.forward = forward
