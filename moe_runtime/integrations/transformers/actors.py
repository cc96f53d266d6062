"""A model's experts, as the model calls them: rows go to their actors and come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from moe_runtime.errors import UnavailableError, UnsupportedModelError
from moe_runtime.integrations.transformers.refusals import refuse_pickling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from moe_runtime.integrations.transformers.belongings import Belongings
    from moe_runtime.launch.library import LayerCaller
    from moe_runtime.launch.served import Runtime


class ExpertActors:
    """The experts of one model, in the actors of a runtime.

    A copy of the model shares them. Thread-safe: calls of several threads take turns.

    Args:
        runtime: Has the actors.
        caller: Calls its layers.
        layers: Names of the layers, by the paths of the model's modules that hold experts.
        belongings: What is given back when the experts are closed.

    Attributes:
        runtime: The same.
        caller: The same.
        layers: The same.
    """

    def __init__(
        self, runtime: Runtime, *, caller: LayerCaller, layers: Mapping[str, str], belongings: Belongings
    ) -> None:
        self.runtime = runtime
        self.caller = caller
        self.layers = dict(layers)
        self._belongings = belongings
        belongings.give_back_with(self)

    def close(self) -> None:
        """Stop calling them, and end the runtime if it was started for them. Safe to call twice."""
        self._belongings.give_back()

    def check_open(self) -> None:
        """Check that they can be called.

        Raises:
            UnavailableError: If they were closed.
        """
        if self._belongings.is_given_back:
            raise UnavailableError("the model's experts were closed: load it again")

    def __deepcopy__(self, _memo: object) -> ExpertActors:
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling()


class LayerRows:
    """Rows of the experts of one layer, as the model's module asks for them.

    Args:
        actors: Where the experts are.
        layer: Name of the layer.
        dtype: Of its experts.
    """

    def __init__(self, actors: ExpertActors, *, layer: str, dtype: torch.dtype) -> None:
        self._actors = actors
        self._layer = layer
        self._dtype = dtype

    # A compiled model calls its experts as they are: what they do is no graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say
    def __call__(self, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        """Each token's experts' outputs, without weights.

        Args:
            hidden: ``(T, H)``, on any device.
            expert_ids: int64 ``(T, k)``.

        Returns:
            ``(T * k, H)`` by token, then choice, in the layer's dtype, on the device of ``hidden``.

        Raises:
            ExpertError: If an expert cannot be had.
            UnavailableError: If the experts were closed.
            UnsupportedModelError: If the caller would differentiate through them.
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{self._layer}: expected hidden states without gradients, found some that need them: training through "
                "experts in actors comes later; call the model under torch.no_grad(), and leave its parameters frozen"
            )
        self._actors.check_open()
        tokens = hidden.detach() if hidden.requires_grad else hidden
        if tokens.dtype != self._dtype or not tokens.is_cpu:
            tokens = tokens.to("cpu", self._dtype)
        if expert_ids.dtype != torch.int64 or not expert_ids.is_cpu:
            expert_ids = expert_ids.to("cpu", torch.int64)
        rows = self._actors.caller.rows(self._layer, tokens, expert_ids)
        return rows if hidden.is_cpu else rows.to(hidden.device)

    def __deepcopy__(self, _memo: object) -> LayerRows:
        return self

    def __reduce__(self) -> NoReturn:
        refuse_pickling()
