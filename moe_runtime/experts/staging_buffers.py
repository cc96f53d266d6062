"""Memory from which a device copies rows by itself, while the processor does something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

#: Buffers that take turns: one is filled while the other is copied from.
NUM_BUFFERS = 2
MIN_BUFFER_BYTES = 64 << 10
#: The rows of a full run at 2048 float32 columns. Pinned memory is never swapped, so it must not grow without end.
MAX_BUFFER_BYTES = 64 << 20


class Copied(Protocol):
    """Tells when a copy is done: a ``torch.cuda.Event``."""

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class StagingBuffers:
    """A few buffers that are filled in turn; they grow by powers of two, up to a limit, and are kept.

    A buffer is filled again only when the copy from it is done. Used by one thread.
    """

    def __init__(
        self,
        allocate: Callable[[int], Tensor],
        *,
        num_buffers: int = NUM_BUFFERS,
        max_buffer_bytes: int = MAX_BUFFER_BYTES,
    ) -> None:
        """Begin without memory.

        Args:
            allocate: Gives ``(num_bytes,)`` uint8, pinned where the device is to copy from it by itself.
            num_buffers: How many copies may be under way.
            max_buffer_bytes: Rows of more bytes get no buffer; a power of two.
        """
        self._allocate = allocate
        self._max_buffer_bytes = max_buffer_bytes
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(num_buffers)]
        self._copied: list[Copied | None] = [None] * num_buffers
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """How much memory the buffers have by now."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fill(self, parts: Sequence[Tensor], copied: Copied) -> Tensor:
        """The rows of all parts as one tensor, in a buffer, or in memory of their own if they are too many.

        Args:
            parts: At least one, alike but for their number of rows.
            copied: Of the copy that the caller is about to begin from there.
        """
        num_bytes = sum(part.nbytes for part in parts)
        if num_bytes > self._max_buffer_bytes:
            return torch.cat(list(parts))
        num_rows = sum(part.shape[0] for part in parts)
        rows = self._next_buffer(num_bytes, copied)[:num_bytes].view(parts[0].dtype).view(num_rows, *parts[0].shape[1:])
        start = 0
        for part in parts:
            rows[start : start + part.shape[0]] = part
            start += part.shape[0]
        return rows

    def _next_buffer(self, num_bytes: int, copied: Copied) -> Tensor:
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        last = self._copied[turn]
        if last is not None:
            last.synchronize()
        self._copied[turn] = copied
        if self._buffers[turn].nbytes < num_bytes:
            self._buffers[turn] = self._allocate(max(MIN_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length()))
        return self._buffers[turn]
