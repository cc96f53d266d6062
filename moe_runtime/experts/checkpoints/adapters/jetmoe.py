"""JetMoe: two stacks of matrices and a router that already sorts the tokens by expert.

Its attention is a mixture too: each expert there has its own query and output projections, around one attention over
all of them. Those are far smaller than the experts of the MLP, and would take two journeys per layer; they stay in
the caller's process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_runtime.experts.checkpoints.adapters.loops import is_of, with_parameters
from moe_runtime.experts.checkpoints.families import Family, ParameterRows, RowsOf

if TYPE_CHECKING:
    from collections.abc import Mapping

_MATRICES = ("input_linear.weight", "output_linear.weight")


class JetMoeFamily(Family):
    """``JetMoeMoE``: the block with the router."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="jetmoe", name="JetMoeMoE")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.router.num_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module.input_size)

    def parameters(self, module: Any, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        return {f"moe.{name}": ParameterRows(name, expert, expert + 1) for name in _MATRICES}

    def single(self, module: Any) -> nn.Module:
        """See the base class."""
        shapes = [(name, (1, *module.get_parameter(name).shape[1:])) for name in _MATRICES]
        one = with_parameters(module, shapes)
        del one.router, one.bias
        return JetMoeExpert(one).eval()

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(layer_input: Tensor) -> Tensor:
            tokens = layer_input.reshape(-1, layer_input.shape[-1])
            order, token_ids, gates, counts, _ = module.router(tokens)
            sorted_ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            expert_ids = torch.empty_like(order).scatter_(0, order, sorted_ids).view(len(tokens), -1)
            weighted = rows(tokens, expert_ids)[order] * gates[:, None]
            # In one call, as the model does: in bfloat16 that rounds once, where adding one by one rounds each time.
            mixed = torch.zeros_like(tokens, dtype=weighted.dtype).index_add(0, token_ids, weighted)
            biased: Tensor = mixed.view_as(layer_input) + module.bias
            return biased

        module.forward = forward


class JetMoeExpert(nn.Module):
    """One expert of JetMoe's MLP.

    Args:
        moe: The model's block with the matrices of one expert, ``(1, O, I)`` each, without router and bias.
    """

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        gate, up = functional.linear(rows, self.moe.input_linear.weight[0]).chunk(2, dim=-1)
        return functional.linear(self.moe.activation(gate) * up, self.moe.output_linear.weight[0])
