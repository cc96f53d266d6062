"""Building a model of transformers without its experts' parameters."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.experts.checkpoints.families import family_of
from moe_runtime.experts.checkpoints.internals import mark_initialized

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

#: Held while classes are changed: those who would restore them in another order than they changed them wait.
_CHANGING = threading.RLock()
#: Where an expert's parameter was: transformers leaves it alone, and it is no parameter.
_ABSENT = torch.empty(0)
mark_initialized(_ABSENT)


@contextmanager
def without_experts(module_classes: Iterable[type[nn.Module]]) -> Iterator[None]:
    """Within it, modules of these classes that this thread makes come up without the parameters of their experts.

    It changes the classes for the whole process, and restores them when it is left; other threads that enter one wait
    until then. Threads that build whole models meanwhile are left alone.

    Args:
        module_classes: Classes that hold experts, as ``Checkpoint.expert_classes`` lists them.
    """
    with _CHANGING, ExitStack() as restoring:
        for module_class in set(module_classes):
            init: Any = module_class.__init__
            restoring.callback(setattr, module_class, "__init__", init)
            setattr(module_class, "__init__", _then_dropping(init, module_class))  # noqa: B010  a method, to mypy
        yield


def drop_experts(module: nn.Module) -> None:
    """Take the experts' parameters out of a module that holds experts, where they are still in it."""
    family = family_of(type(module))
    if family is None:
        return
    owned = {
        rows.parameter
        for expert in range(family.num_experts(module))
        for rows in family.parameters(module, expert).values()
    }
    for name in owned:
        owner_name, _, parameter = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        del owner._parameters[parameter]
        # Or transformers would initialise what is no longer there, or fail to: in this module, or in one around it.
        mark_initialized(owner)
        owner.__dict__[parameter] = _ABSENT


def _then_dropping(init: Any, module_class: type[nn.Module]) -> Any:
    maker = threading.get_ident()

    @wraps(init)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # A subclass's own constructor may still add to it.
        if type(self) is module_class and threading.get_ident() == maker:
            drop_experts(self)

    return build
