"""The bias that balances experts without a loss: lower for the busy, higher for the idle (DeepSeek-V3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from moe_runtime.routing.gate import Gate


def bias_update(counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """What to add to each expert's selection bias after an optimiser step, before centring.

    ``rate * sign(mean(counts) - counts)`` (https://arxiv.org/abs/2408.15664, algorithm 1).

    Args:
        counts: Assignments that each expert was asked for, over all routers, ``(num_experts,)``.
        rate: Size of one step.

    Returns:
        float32 ``(num_experts,)``; 0 for an expert that is at the mean.
    """
    # float64: a mean of millions in float32 may miss experts that are at it.
    counts = counts.double()
    return rate * torch.sign(counts.mean() - counts).float()


def update_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """The bias after a step, with mean 0: ``(num_experts,)``; see ``bias_update``.

    Args:
        bias: The bias before, ``(num_experts,)``.
        counts: As for ``bias_update``.
        rate: Size of one step.
    """
    moved = bias + bias_update(counts, rate=rate)
    return moved - moved.mean()


class BiasController:
    """Moves a gate's ``expert_bias`` in training, one step after each of the optimiser's, by the experts' loads.

    Give it the load of every micro-batch, of every router that shares the gate, and call ``step`` where the optimiser
    steps. What processes of their own have counted is summed by the caller: ``observe`` their sum. Not thread-safe.

    Args:
        gate: A gate that keeps a bias; it is changed in place, between forward passes.
        rate: Size of one step.

    Raises:
        ConfigError: If the gate keeps no bias.
    """

    def __init__(self, gate: Gate, *, rate: float = 1e-3) -> None:
        self.rate = rate
        self._gate = gate
        self._counts = torch.zeros(len(self._bias), dtype=torch.int64)

    @property
    def counts(self) -> tuple[int, ...]:
        """Assignments that each expert was asked for since the last step."""
        return tuple(self._counts.tolist())

    def observe(self, load: Sequence[int] | Tensor) -> None:
        """Add what one micro-batch asked of each expert, ``Assignments.load``, before drops.

        Raises:
            ShapeError: If there is not one number per expert.
        """
        self._counts += self._one_per_expert(load)

    def step(self) -> None:
        """Move the bias by what was observed since the last step, and begin anew; without any load nothing moves."""
        if not self._counts.any():
            return
        bias = self._bias
        with torch.no_grad():
            bias.copy_(update_bias(bias, self._counts.to(bias.device), rate=self.rate))
        self._counts.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint between two steps must keep; the bias itself is in the gate's own ``state_dict``."""
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the counts of a checkpoint, in place of what was observed.

        Raises:
            ShapeError: If there is not one number per expert.
        """
        self._counts = self._one_per_expert(state["counts"]).clone()

    @property
    def _bias(self) -> Tensor:
        # Asked of the gate each time: ``gate.to(device)`` replaces its buffers.
        if self._gate.expert_bias is None:
            raise ConfigError(
                "gate: expected one that keeps an expert_bias, found one without; its layer's policy must select by "
                "it (top_k with expert_bias: true)"
            )
        return self._gate.expert_bias

    def _one_per_expert(self, load: Sequence[int] | Tensor) -> Tensor:
        counts = torch.as_tensor(load, dtype=torch.int64, device="cpu")
        if counts.shape != self._counts.shape:
            raise ShapeError(
                f"load: expected one number per expert, shape ({len(self._counts)},), found {tuple(counts.shape)}"
            )
        return counts
