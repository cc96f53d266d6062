"""Reinforce: experts sampled from the softmax, so that a gate can learn from a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.assignments import Grid
from moe_runtime.routing.draws import uniform_draws
from moe_runtime.routing.policies.choices import only_requested, requested_choices
from moe_runtime.routing.policies.facts import required_fact
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import RowFact, TokenInfo

_STREAM = 2
# Half the step of a draw: the logarithm of 0 is infinite.
_SMALLEST_DRAW = 2.0**-54


@dataclass(frozen=True, kw_only=True)
class ReinforcePolicy(Policy):
    """Training samples experts without replacement from the softmax; evaluation takes the most likely ones.

    Bengio et al. 2015 (https://arxiv.org/abs/1511.06297). Sampling is the Gumbel-top-k trick (Kool et al. 2019,
    https://arxiv.org/abs/1903.06059): the order of a token's experts is the order in which they would be drawn. What
    is drawn depends on the seeds of the rows alone. ``routing.reinforce`` has the loss.

    Attributes:
        samples: Whether evaluation samples as well.
    """

    samples: bool = False
    can_reroute: bool = True
    reads: frozenset[RowFact] = frozenset({"row_seeds"})

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether it samples outside training too."""
        return self.samples

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """The assignments that the tokens of a batch ask for; see ``Policy.assign``.

        Raises:
            InvalidRequestError: If it samples and the rows have no seeds.
        """
        width = self.num_choices(info)
        scores = torch.softmax(logits, dim=-1)
        preferences = self._perturbed(logits.detach(), info) if info.training or self.samples else scores
        expert_ids = torch.topk(preferences, width, dim=-1).indices
        grid = Grid(expert_ids, scores.gather(1, expert_ids))
        return self.assignments(only_requested(grid, requested_choices(width, info)), logits, all_scores=scores)

    def _perturbed(self, logits: Tensor, info: TokenInfo) -> Tensor:
        """Logits plus Gumbel noise, float64 ``(num_tokens, num_experts)``."""
        seeds = required_fact(info, "row_seeds", device=logits.device)
        draws = uniform_draws(seeds[:, None], torch.arange(self.num_experts, device=logits.device), stream=_STREAM)
        return logits.double() - (-draws.clamp_min(_SMALLEST_DRAW).log()).log()
