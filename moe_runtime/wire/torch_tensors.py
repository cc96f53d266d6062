"""Torch tensors to wire tensors and back; the only module of this layer that imports torch.

Clients load it by name, and only when a caller hands them a torch tensor.
"""

from __future__ import annotations

import torch

from moe_runtime.errors import DTypeError
from moe_runtime.wire.messages import WireTensor
from moe_runtime.wire.tensors import WIRE_DTYPES

TORCH_DTYPES = {name: getattr(torch, name) for name in WIRE_DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def from_torch(tensor: torch.Tensor) -> WireTensor:
    """The tensor as it travels, detached; shares its memory where it is contiguous and on the CPU.

    Raises:
        DTypeError: If the protocol has no such dtype.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise DTypeError(f"expected a torch tensor of {', '.join(TORCH_DTYPES)}, found {tensor.dtype}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return WireTensor(dtype=name, shape=tuple(tensor.shape), data=flat.view(torch.uint8).numpy().data)


def to_torch(tensor: WireTensor) -> torch.Tensor:
    """The tensor as torch, on the CPU, in memory of its own."""
    dtype = TORCH_DTYPES[tensor.dtype]
    if not len(tensor.data):
        return torch.empty(tensor.shape, dtype=dtype)
    # a copy, because torch has no read-only tensors and bytes must not change
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)
