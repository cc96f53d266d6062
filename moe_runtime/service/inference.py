"""Running what needs no gradients."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_Self = TypeVar("_Self")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_gradients(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """The same method in torch's inference mode, which takes time to enter: not where gradients are off already."""

    @wraps(method)
    def run(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return method(self, *args, **kwargs)
        with torch.inference_mode():
            return method(self, *args, **kwargs)

    return run
