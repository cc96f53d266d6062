"""DBRX: three matrices per expert, those of all experts below each other in one, ``(E * F, H)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moe_runtime.experts.checkpoints.adapters.loops import is_of, sum_by_expert, with_parameters
from moe_runtime.experts.checkpoints.families import Family, ParameterRows, RowsOf

if TYPE_CHECKING:
    from collections.abc import Mapping

_MATRICES = ("w1", "v1", "w2")


class DbrxFamily(Family):
    """``DbrxExperts``, called with the router's choice as the decorated classes are."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="dbrx", name="DbrxExperts")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.num_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module.hidden_size)

    def parameters(self, module: Any, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        size = module.ffn_hidden_size
        start = expert * size
        return {f"mlp.{name}": ParameterRows(f"mlp.{name}", start, start + size) for name in _MATRICES}

    def single(self, module: Any) -> nn.Module:
        """See the base class."""
        shape = (module.ffn_hidden_size, module.hidden_size)
        return DbrxExpert(with_parameters(module.mlp, [(name, shape) for name in _MATRICES])).eval()

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            found = rows(tokens, top_k_index)
            return sum_by_expert(found, top_k_index, top_k_weights, dtype=tokens.dtype).view_as(hidden_states)

        module.forward = forward


class DbrxExpert(nn.Module):
    """One expert of DBRX, by the model's own ``DbrxExpertGLU``.

    Args:
        mlp: That module, with the matrices of one expert, ``(F, H)`` each.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        outputs: Tensor = self.mlp(rows, *(getattr(self.mlp, name) for name in _MATRICES))
        return outputs
