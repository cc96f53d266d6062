"""What adapters of models share whose experts' matrices are stacked, as in the decorated classes."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from moe_runtime.experts.checkpoints.adapters.loops import with_parameters
from moe_runtime.experts.checkpoints.families import Family, ParameterRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_MATRICES = ("gate_up_proj", "down_proj")


class StackedFamily(Family):
    """Modules with ``gate_up_proj`` and ``down_proj`` of their own, one row of dimension 0 for each expert."""

    @abstractmethod
    def one_of(self, experts: Any) -> nn.Module:
        """What computes the only expert of a module; it keeps it as ``experts``."""

    def parameters(self, module: Any, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        return {f"experts.{name}": ParameterRows(name, expert, expert + 1) for name in _MATRICES}

    def single(self, module: Any) -> nn.Module:
        """See the base class."""
        shapes = [(name, (1, *module.get_parameter(name).shape[1:])) for name in _MATRICES]
        return self.one_of(with_parameters(module, shapes)).eval()
