"""Memory for the rows that come back from experts, used again and again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Below this a fresh allocation is as quick; above it the kernel would map and clear new pages every time.
_WORTH_KEEPING_BYTES = 128 << 10


class RowBuffers:
    """Lends uninitialised memory for one batch's expert rows at a time. Owned by one thread.

    Args:
        max_kept: Buffers that are kept while nobody uses them.
    """

    def __init__(self, *, max_kept: int = 4) -> None:
        self._max_kept = max_kept
        self._kept: list[Tensor] = []

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of that shape and dtype, on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _WORTH_KEEPING_BYTES:
            return torch.empty(shape, dtype=dtype)
        # The kept ones are sorted, largest first.
        fitting = sum(buffer.nbytes >= num_bytes for buffer in self._kept)
        buffer = self._kept.pop(fitting - 1) if fitting else torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes].view(dtype).reshape(shape)

    def give_back(self, rows: Tensor) -> None:
        """Take memory back that ``lend`` gave; the caller must hold no view of it."""
        if rows.nbytes < _WORTH_KEEPING_BYTES:
            return
        self._kept.append(torch.empty(0, dtype=torch.uint8).set_(rows.untyped_storage()))
        self._kept.sort(key=lambda buffer: buffer.nbytes, reverse=True)
        del self._kept[self._max_kept :]
