"""How the models of transformers hold their experts: one family for all that share its decorator, adapters for others.

A family knows two things about a module of a model that holds experts: how a host computes one of them, and how the
caller's process lets other processes compute them all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.internals import apply_gate, is_decorated
from moe_runtime.experts.checkpoints.unknown import refuse_unknown_experts

if TYPE_CHECKING:
    from collections.abc import Sequence

#: ``rows(hidden, expert_ids)``: tokens ``(T, H)`` and the experts of each, int64 ``(T, k)``, to the experts' outputs,
#: without weights, by token, then choice: ``(T * k, H)``.
RowsOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ParameterRows:
    """What one expert owns of one parameter of the model's module.

    Attributes:
        parameter: Name of the parameter, relative to the module that holds the experts.
        start: First row of its dimension 0 that is the expert's; None if all of it is, or all experts share it.
        stop: The row after the last one.
    """

    parameter: str
    start: int | None = None
    stop: int | None = None

    @property
    def rows(self) -> slice | None:
        """The rows of dimension 0; None for all of them."""
        return None if self.start is None else slice(self.start, self.stop)


class Family(ABC):
    """One way in which modules of transformers hold experts.

    The module is that whose forward the caller's process replaces; the experts' parameters are its own or those of its
    children. All methods but ``bind`` and ``single``'s module also work on the meta device.
    """

    @abstractmethod
    def matches(self, module_class: type[nn.Module]) -> bool:
        """Whether modules of this class hold experts in this way."""

    @abstractmethod
    def num_experts(self, module: nn.Module) -> int:
        """How many experts the module holds."""

    @abstractmethod
    def hidden_size(self, module: nn.Module) -> int:
        """Width of the rows that an expert takes and gives."""

    @abstractmethod
    def parameters(self, module: nn.Module, expert: int) -> Mapping[str, ParameterRows]:
        """Which rows of the module's parameters make each parameter of ``single(module)``, by name there."""

    @abstractmethod
    def single(self, module: nn.Module) -> nn.Module:
        """A module of ONE expert, in eval mode, with its parameters on the meta device.

        It takes rows ``(N, H)`` and gives the expert's rows ``(N, H)``, not weighted, bit-equal to what the model's
        own ``grouped_mm`` implementation makes of them.

        Args:
            module: The model's, on the meta device; it is not changed.
        """

    @abstractmethod
    def bind(self, module: nn.Module, rows: RowsOf) -> None:
        """Replace the forward of a module of the model's skeleton by one that asks for its experts' rows.

        Args:
            module: Of the model in the caller's process; its experts' parameters are not there.
            rows: Where the rows come from.
        """


class DecoratedFamily(Family):
    """Classes under ``@use_experts_implementation``: stacked matrices with flags that say how they are laid out."""

    def matches(self, module_class: type[nn.Module]) -> bool:
        """See the base class."""
        return is_decorated(module_class)

    def num_experts(self, module: nn.Module) -> int:
        """See the base class."""
        return int(module.get_parameter("down_proj").shape[0])

    def hidden_size(self, module: nn.Module) -> int:
        """See the base class."""
        return int(module.get_parameter("down_proj").shape[2 if module.is_transposed else 1])

    def parameters(self, module: nn.Module, expert: int) -> Mapping[str, ParameterRows]:
        """See the base class."""
        return {
            f"experts.{name}": ParameterRows(name, expert, expert + 1)
            if name in _stacked(module)
            else ParameterRows(name)
            for name, _ in module.named_parameters()
        }

    def single(self, module: nn.Module) -> nn.Module:
        """See the base class."""
        return DecoratedExpert(_with_one_expert(module)).eval()

    def bind(self, module: nn.Module, rows: RowsOf) -> None:
        """See the base class."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return weighted_sum(rows(hidden_states, top_k_index), top_k_weights, dtype=hidden_states.dtype)

        # Of this module, not of its class.
        module.forward = forward


class DecoratedExpert(nn.Module):
    """One expert of a decorated class, by that class's own activation, bias and norm.

    The matrix products are those that ``grouped_mm`` makes of an expert's rows, without its sorting, counting and
    weighting around them.

    Args:
        experts: A module of the class with one expert.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts: Any = experts

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, H)`` to ``(N, H)``, not weighted."""
        experts = self.experts
        outer = "gate_up_proj" if experts.has_gate else "up_proj"
        inner = _linear(experts, outer, rows)
        inner = apply_gate(experts, inner) if experts.has_gate else experts.act_fn(inner)
        outputs = _linear(experts, "down_proj", inner)
        if experts.has_post_expert_norm:
            outputs = experts.post_expert_norm(outputs)
        return outputs


def weighted_sum(rows: Tensor, weights: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Each token's experts' rows, weighted and summed in the order of its choices, as ``grouped_mm`` does.

    Args:
        rows: By token, then choice: ``(T * k, H)``.
        weights: ``(T, k)``.
        dtype: Of the result.

    Returns:
        ``(T, H)``.
    """
    num_tokens, top_k = weights.shape
    return (rows * weights.reshape(-1, 1)).view(num_tokens, top_k, rows.shape[-1]).sum(dim=1).to(dtype)


_DECORATED = DecoratedFamily()


@cache
def families() -> Sequence[Family]:
    """Every family there is, adapters first: some of theirs wrap a decorated class."""
    from moe_runtime.experts.checkpoints.adapters import ADAPTERS  # adapters import this module

    return (*ADAPTERS, _DECORATED)


def family_of(module_class: type[nn.Module]) -> Family | None:
    """The family of a class of modules; None if its modules hold no experts that are known."""
    return next((family for family in families() if family.matches(module_class)), None)


def expert_modules(model: nn.Module) -> dict[str, Family]:
    """The modules of a model that hold experts, by their names, each with its family.

    Raises:
        UnsupportedModelError: If there is none, or one that cannot be taken apart.
    """
    found: dict[str, Family] = {}
    for name, module in model.named_modules():
        family = family_of(type(module))
        if family is not None and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = family
    refuse_unknown_experts(model, found)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a model with experts of a supported family, found none in its modules"
        )
    return found


def twin_on_meta(module: nn.Module) -> nn.Module:
    """Another module like one on the meta device, with parameters of its own; all else of the two is the same."""
    twin = copy.copy(module)
    parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    children = {name: child and twin_on_meta(child) for name, child in module._modules.items()}
    # Not by attributes: torch looks at each value that is set.
    vars(twin).update(_parameters=parameters, _buffers=dict(module._buffers), _modules=children)
    return twin


def _linear(experts: Any, name: str, rows: Tensor) -> Tensor:
    weight = getattr(experts, name)[0]
    outputs = torch.mm(rows.to(weight.dtype), weight if experts.is_transposed else weight.t())
    # Not addmm, which rounds otherwise.
    return outputs.add_(getattr(experts, f"{name}_bias")) if experts.has_bias else outputs


def _stacked(module: nn.Module) -> frozenset[str]:
    names = ("gate_up_proj", "up_proj", "down_proj")
    return frozenset(name for name in (*names, *(f"{name}_bias" for name in names)) if name in module._parameters)


def _with_one_expert(module: nn.Module) -> nn.Module:
    # The configuration is shared: copying it costs more than all the rest.
    one = copy.deepcopy(module, {id(module.config): module.config})
    for name in _stacked(module):
        parameter = module.get_parameter(name)
        one._parameters[name] = nn.Parameter(parameter.new_empty((1, *parameter.shape[1:])), requires_grad=False)
    one.num_experts = 1  # type: ignore[assignment]
    return one.requires_grad_(False).eval()
