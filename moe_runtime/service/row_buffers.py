"""The rows that come back from experts: in memory that is used again and again where they are many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: Below this a fresh allocation is as quick; above it the kernel would map and clear new pages every time.
_WORTH_KEEPING_BYTES = 128 << 10

#: Up to this many bytes of a batch, collecting its rows at the end is quicker than copying them as they arrive.
_COLLECTED_AT_ONCE_BYTES = 256 << 10


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


class ExpertRows:
    """Collects one batch's expert rows in plan order, as they arrive.

    A few rows stay where they arrived until all have, for one call is quicker than one for each message; many
    are copied at once, while other hosts are at work.

    Args:
        shape: ``(num_planned, *out_shape)``.
        dtype: Of the rows when they are collected, whatever they arrive in.
        buffers: Lends memory for them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, buffers: RowBuffers) -> None:
        self._shape = shape
        self._dtype = dtype
        self._buffers = buffers
        self._arrived: list[tuple[int, Tensor]] = []
        self._memory: Tensor | None = None
        if math.prod(shape) * dtype.itemsize > _COLLECTED_AT_ONCE_BYTES:
            self._memory = buffers.lend(shape, dtype)

    def place(self, rows: Sequence[int], values: Tensor) -> None:
        """Take the values of planned rows, each once; they may be kept until ``collect``."""
        if self._memory is None and isinstance(rows, range):
            self._arrived.append((rows.start, values))
            return
        memory = self._to_memory() if self._memory is None else self._memory
        if isinstance(rows, range):
            memory.narrow(0, rows.start, len(rows)).copy_(values)
        else:
            memory.index_copy_(0, torch.tensor(rows), values.to(self._dtype))

    def collect(self) -> Tensor:
        """All rows, ``(num_planned, *out_shape)``, to be read until ``release``; what never arrived holds anything."""
        if self._memory is not None:
            return self._memory
        parts = [rows for _, rows in sorted(self._arrived, key=_start)]
        if parts and sum([rows.shape[0] for rows in parts]) == self._shape[0]:
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._dtype)
        return self._to_memory()

    def release(self) -> None:
        """Give the memory back; nobody may hold a view of it."""
        if self._memory is not None:
            self._buffers.give_back(self._memory)

    def _to_memory(self) -> Tensor:
        self._memory = self._buffers.lend(self._shape, self._dtype)
        for start, rows in self._arrived:
            self._memory.narrow(0, start, rows.shape[0]).copy_(rows)
        return self._memory


def _start(arrived: tuple[int, Tensor]) -> int:
    return arrived[0]
