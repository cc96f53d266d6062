"""Step 3.7: stacked matrices as in the decorated classes, and a clamp of the gated activation that layers may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from moe_runtime.experts.checkpoints.adapters.loops import is_of, sum_by_expert
from moe_runtime.experts.checkpoints.adapters.stacked import StackedFamily
from moe_runtime.experts.checkpoints.internals import apply_gate

if TYPE_CHECKING:
    from moe_runtime.experts.checkpoints.families import RowsOf


class Step3p7Family(StackedFamily):
    """``Step3p7Experts``, called with the router's choice as the decorated classes are."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="step3p7", name="Step3p7Experts")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.num_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module.hidden_dim)

    def one_of(self, experts: Any) -> nn.Module:
        """See the base class."""
        return Step3p7Expert(experts)

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            found = rows(hidden_states, top_k_index)
            return sum_by_expert(found, top_k_index, top_k_weights, dtype=hidden_states.dtype)

        module.forward = forward


class Step3p7Expert(nn.Module):
    """One expert of Step 3.7.

    Args:
        experts: The model's own module with the matrices of one expert, ``(1, 2I, H)`` and ``(1, H, I)``.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        inner = apply_gate(self.experts, functional.linear(rows, self.experts.gate_up_proj[0]))
        return functional.linear(inner, self.experts.down_proj[0])
