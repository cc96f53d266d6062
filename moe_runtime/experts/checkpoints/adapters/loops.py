"""What the adapters share: classes are known by their names, and their own forward is a loop over the experts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable


def is_of(module_class: type[nn.Module], *, model: str, name: str) -> bool:
    """Whether a class is the one of that name of a model of transformers, without importing the model.

    Args:
        module_class: Any class of modules.
        model: The model's folder in transformers, ``dbrx``.
        name: Of the class.
    """
    return module_class.__module__ == f"transformers.models.{model}.modeling_{model}" and module_class.__name__ == name


def sum_by_expert(rows: Tensor, expert_ids: Tensor, weights: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Each token's weighted rows, added one after the other in the order of their experts' ids.

    That is what a loop over the experts with ``index_add_`` computes: every term and every partial sum is rounded to
    ``dtype``. With three choices or more another order would give other last bits.

    Args:
        rows: By token, then choice: ``(T * k, H)``, not weighted.
        expert_ids: int64 ``(T, k)``, no expert twice for a token.
        weights: ``(T, k)``.
        dtype: Of the result.

    Returns:
        ``(T, H)``.
    """
    num_tokens, top_k = expert_ids.shape
    terms = (rows * weights.reshape(-1, 1)).to(dtype).view(num_tokens, top_k, -1)
    order = expert_ids.argsort(dim=1)
    total = torch.zeros_like(terms[:, 0])
    for rank in range(top_k):
        total += terms[torch.arange(num_tokens), order[:, rank]]
    return total


def with_parameters(module: nn.Module, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Any:
    """A copy of a module on the meta device with some parameters in other shapes, in eval mode.

    Args:
        module: To copy, with its parameters on the meta device; its configuration is shared with the copy.
        shapes: Name and shape of each parameter to change.

    Returns:
        The module; typed ``Any``, since its attributes are its class's own.
    """
    shared = getattr(module, "config", None)
    made = copy.deepcopy(module, {id(shared): shared})
    for name, shape in shapes:
        owner = made.get_submodule(name.rpartition(".")[0])
        parameter = made.get_parameter(name)
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
    return made.requires_grad_(False).eval()
