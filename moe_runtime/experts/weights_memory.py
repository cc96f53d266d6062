"""Memory for the weights of experts: on huge pages where the kernel has some."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
#: Smaller tensors gain nothing.
_MIN_BYTES = 64 << 10
#: What torch gives its own tensors: products of weights that lie otherwise may have other last bits.
_ALIGNMENT = 64


class WeightsMemory:
    """Gives memory for weights, one piece behind the other, and never takes any back. Thread-safe.

    An expert that has few rows reads all of its weights for them, and is as fast as that. On pages of 4 kB the
    processor looks up where thousands of them are, and what it knew of everybody else's is forgotten: huge pages take a
    tenth of the time of a product with few rows away. A chunk is freed when no tensor lies in it any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _MIN_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return self._take(num_bytes).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> Tensor:
        with self._lock:
            if num_bytes > self._rest.nbytes:
                self._rest = _chunk(max(num_bytes, _CHUNK_BYTES))
            taken, self._rest = self._rest[:num_bytes], self._rest[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def _chunk(num_bytes: int) -> Tensor:
    """So many bytes from the start of a huge page on; pages that are never written to take no memory."""
    mapped = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        # A kernel without them says no; small pages will do.
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + num_bytes]


WEIGHTS_MEMORY = WeightsMemory()
"""Of this process."""
