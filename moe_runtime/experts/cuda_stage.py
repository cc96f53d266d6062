"""The stage of a GPU: copies in, products and copies out, each in a stream of its own so that they overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.experts.device_stage import Forwarded
from moe_runtime.experts.staging_buffers import MAX_BUFFER_BYTES, StagingBuffers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class _OnItsWay:
    """An answer that is being copied into the CPU's memory.

    Attributes:
        rows: That memory.
        began: When the forward began, in the device's time.
        computed: When the answer was there, on the device.
        left: When it was here.
    """

    rows: Tensor
    began: torch.cuda.Event
    computed: torch.cuda.Event
    left: torch.cuda.Event

    def wait(self) -> Forwarded:
        """The answer, once all of it is here."""
        self.left.synchronize()
        return Forwarded(self.rows, self.began.elapsed_time(self.computed))


class CudaStage:
    """Rows go through pinned memory and a stream of copies, to products in the thread's current stream.

    Three streams and events between them; nothing ever waits for the whole device. The order is

    1. The parts are put, merged, into one of a few pinned buffers, once the last copy from it is done.
    2. The copy stream takes them to the device, still in the wire's dtype.
    3. The compute stream waits for that copy, converts, and runs the forward.
    4. Another copy stream waits for the forward and takes the answer to pinned memory that is the answer's own.
       Torch's allocator keeps such memory and gives it out again, but not before the last tensor in it is gone
       and the copies into it are done; so an answer may be sent from where it lies.

    Copies in and out have a stream each: in one, the next rows would wait behind the answer to these.
    """

    overlaps = True

    def __init__(self, device: torch.device, *, max_buffer_bytes: int = MAX_BUFFER_BYTES) -> None:
        """Make the streams.

        Args:
            device: A CUDA device.
            max_buffer_bytes: Rows or answers of more do not go through pinned memory; a power of two.
        """
        self._device = device
        self._max_buffer_bytes = max_buffer_bytes
        self._copy_in = _stream(device)
        self._copy_out = _stream(device)
        self.buffers = StagingBuffers(_pinned_bytes, max_buffer_bytes=max_buffer_bytes)

    def begin(
        self,
        forward: Callable[[Tensor], Tensor],
        parts: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        row_dtype: torch.dtype,
    ) -> _OnItsWay:
        """Queue the copy in, ``forward`` and the copy out; see ``DeviceStage.begin``."""
        with torch.cuda.device(self._device):
            compute = torch.cuda.current_stream()
            rows = self._bring_in(parts, compute)
            began, computed = _event(is_timed=True), _event(is_timed=True)
            began.record(compute)
            # Converted here, not before: what crosses the bus is in the wire's dtype.
            outputs = forward(rows.to(dtype)).to(self._device, row_dtype).contiguous()
            computed.record(compute)
            return self._take_out(outputs, began, computed)

    def _bring_in(self, parts: Sequence[Tensor], compute: torch.cuda.Stream) -> Tensor:
        """The parts' rows on the device, there for what the compute stream is given from now on."""
        copied = _event()
        staged = self.buffers.fill(parts, copied)
        with torch.cuda.stream(self._copy_in):
            rows = staged.to(self._device, non_blocking=True)
            copied.record(self._copy_in)
        compute.wait_event(copied)
        # The allocator knows the copy stream only; without this it would give the memory out again too early.
        rows.record_stream(compute)
        return rows

    def _take_out(self, outputs: Tensor, began: torch.cuda.Event, computed: torch.cuda.Event) -> _OnItsWay:
        is_pinned = outputs.nbytes <= self._max_buffer_bytes
        left = _event()
        self._copy_out.wait_event(computed)
        with torch.cuda.stream(self._copy_out):
            rows = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=is_pinned)
            rows.copy_(outputs, non_blocking=is_pinned)
            left.record(self._copy_out)
        outputs.record_stream(self._copy_out)
        return _OnItsWay(rows, began, computed, left)


def _pinned_bytes(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch has no types for it


def _event(*, is_timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=is_timed)  # type: ignore[no-untyped-call] # torch has no types for it
