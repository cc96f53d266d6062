"""Llama 4: the sigmoid of the score scales the expert's input, and the model's own code runs all experts on all tokens.

Here an expert gets its own tokens only: for the others its input would be zero, and so would its output be. A matrix
product over fewer rows may round otherwise, so the logits are those of the model to a few units in the last place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.experts.checkpoints.adapters.loops import is_of, with_parameters
from moe_runtime.experts.checkpoints.families import Family, ParameterRows, RowsOf

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_MATRICES = ("gate_up_proj", "down_proj")


class Llama4Family(Family):
    """``Llama4TextMoe``: the block with the router, since the scaled inputs are made there."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_of(module_class, model="llama4", name="Llama4TextMoe")

    def num_experts(self, module: Any) -> int:
        """See the base class."""
        return int(module.num_experts)

    def hidden_size(self, module: Any) -> int:
        """See the base class."""
        return int(module.hidden_dim)

    def parameters(self, module: Any, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        return {name: ParameterRows(f"experts.{name}", expert, expert + 1) for name in _MATRICES}

    def single(self, module: Any) -> nn.Module:
        """See the base class. It is the model's own class of experts, which takes the rows of its only one."""
        experts = module.experts
        one: nn.Module = with_parameters(
            experts, [(name, (1, *experts.get_parameter(name).shape[1:])) for name in _MATRICES]
        )
        return one

    def bind(self, module: Any, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            tokens = hidden_states.reshape(-1, module.hidden_dim)
            scores, logits = module.router(tokens)
            # By id, for the model sums over its experts; the scores of those not chosen are sigmoid(-inf) = 0.
            expert_ids = logits.topk(module.top_k, dim=1).indices.sort(dim=1).values
            scaled = tokens[:, None] * scores.gather(1, expert_ids)[:, :, None]
            found = rows(scaled.flatten(0, 1), expert_ids.reshape(-1, 1))
            out: Tensor = module.shared_expert(tokens)
            return out.add_(found.view_as(scaled).sum(dim=1)), logits

        module.forward = forward
