"""The caller's arrays to wire tensors, and answers back to what the caller uses: numpy or torch."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.errors import DTypeError, InvalidRequestError
from moe_runtime.wire.tensors import from_numpy, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.wire.messages import WireTensor

#: What a caller may give, in the words of errors.
ARRAY = "a numpy array or a torch tensor"


def to_wire(array: Any, *, name: str = "inputs", expected: str = ARRAY) -> WireTensor:
    """A numpy array or torch tensor as it travels.

    Args:
        array: The caller's.
        name: What it is to the caller, for errors.
        expected: What the caller should give, for errors.

    Raises:
        InvalidRequestError: If it is neither.
        DTypeError: If the protocol has no such dtype.
    """
    try:
        if isinstance(array, np.ndarray):
            return from_numpy(array)
        if _is_torch(array):
            return _torch_tensors().from_torch(array)  # type: ignore[no-any-return]  # the module is loaded by name
    except DTypeError as exc:
        raise DTypeError(f"{name}: {exc}") from exc
    raise InvalidRequestError(f"{name}: expected {expected}, found {type(array).__name__}")


def converter_like(array: Any) -> Callable[[WireTensor], Any]:
    """What turns answers into the kind of the array: numpy, or torch on the same device."""
    if not _is_torch(array):
        return to_numpy
    to_torch = _torch_tensors().to_torch
    device = array.device
    return lambda tensor: to_torch(tensor).to(device)


def _is_torch(array: Any) -> bool:
    # who holds a tensor has imported torch; the client never does of its own accord
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _torch_tensors() -> Any:
    return importlib.import_module("moe_runtime.wire.torch_tensors")
