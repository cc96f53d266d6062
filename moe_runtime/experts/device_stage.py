"""How rows get to the device of an expert, and its answer back: at once on the CPU, in streams on a GPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Forwarded(NamedTuple):
    """An answer that is here.

    Attributes:
        rows: On the CPU, contiguous, in the wire's dtype.
        compute_ms: Time that the forward took.
    """

    rows: Tensor
    compute_ms: float

    def wait(self) -> Forwarded:
        """This."""
        return self


class Forwarding(Protocol):
    """A forward that has begun."""

    def wait(self) -> Forwarded:
        """Its answer, once all of it is in the CPU's memory.

        Raises:
            RuntimeError: If the device failed.
        """
        ...


class DeviceStage(Protocol):
    """Runs forwards on one device; used by one thread, in inference mode."""

    @property
    def overlaps(self) -> bool:
        """Whether ``begin`` may return before the forward is done, so that it pays to begin the next one."""
        ...

    def begin(
        self,
        forward: Callable[[Tensor], Tensor],
        parts: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        row_dtype: torch.dtype,
    ) -> Forwarding:
        """Run ``forward`` on the rows of all parts as one tensor, and send its answer on the way back.

        The parts may be changed once ``wait`` has returned. What ``forward`` raises comes through.

        Args:
            forward: Takes ``(sum of the parts' rows, *in_shape)`` in ``dtype`` on the device.
            parts: At least one, of ``(num_rows, *in_shape)`` each, on the CPU and in the wire's dtype.
            dtype: Of the computation.
            row_dtype: Of the answer's rows: the wire's.
        """
        ...


class CpuStage:
    """The stage of a device that is the CPU: nothing moves, and what needs no conversion is not touched."""

    overlaps = False

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Take the clock that forwards are timed by, in seconds."""
        self._now = now

    def begin(
        self,
        forward: Callable[[Tensor], Tensor],
        parts: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        row_dtype: torch.dtype,
    ) -> Forwarded:
        """Run ``forward`` to its end."""
        started = self._now()
        rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        # Small experts cost what calls into torch cost: those that would change nothing are not made.
        outputs = forward(rows if rows.dtype == dtype else rows.to(dtype))
        if outputs.dtype != row_dtype or not outputs.is_cpu:
            outputs = outputs.to("cpu", row_dtype)
        outputs = outputs.contiguous()
        return Forwarded(outputs, (self._now() - started) * 1e3)
