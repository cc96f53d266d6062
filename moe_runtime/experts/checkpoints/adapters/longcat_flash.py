"""LongCat Flash: beside its experts the router may choose "zero" experts, which give back what they get.

Zero experts have no parameters and stay in the caller's process: only the choices of real ones travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from moe_runtime.experts.checkpoints.adapters.loops import is_of, sum_by_expert
from moe_runtime.experts.checkpoints.adapters.stacked import StackedFamily

if TYPE_CHECKING:
    from moe_runtime.experts.checkpoints.families import RowsOf


class LongcatFlashFamily(StackedFamily):
    """``LongcatFlashExperts``. Its ``gate_up_proj`` has rows for the zero experts too, which nothing reads."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="longcat_flash", name="LongcatFlashExperts")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.num_routed_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module.hidden_size)

    def one_of(self, experts: Any) -> nn.Module:
        """See the base class."""
        return LongcatFlashExpert(experts)

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            # A zero expert's row is its token's.
            found = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0)
            expert_ids = top_k_index.reshape(-1)
            real = (expert_ids < module.num_routed_experts).nonzero().squeeze(1)
            if len(real):
                found[real] = rows(found[real], expert_ids[real, None])
            return sum_by_expert(found, top_k_index, top_k_weights, dtype=hidden_states.dtype)

        module.forward = forward


class LongcatFlashExpert(nn.Module):
    """One expert of LongCat Flash.

    Args:
        experts: The model's own module with the matrices of one expert, ``(1, 2I, H)`` and ``(1, H, I)``.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        gate, up = functional.linear(rows, self.experts.gate_up_proj[0]).chunk(2, dim=-1)
        inner = self.experts.act_fn(gate) * up
        return functional.linear(inner, self.experts.down_proj[0])
