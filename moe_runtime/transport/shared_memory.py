"""Memory that a router and a host of one node share: no name, a fixed size, gone with its last user.

A segment is an anonymous file in memory. It is never in ``/dev/shm``, so nothing is left behind when either side
is killed; its pages are allocated before they are used, and its size is sealed, so that touching it can never be
a bus error.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_segment(num_bytes: int) -> tuple[int, memoryview]:
    """A new segment's descriptor, which the caller closes once the peer has it, and its memory.

    Raises:
        OSError: If there is not so much memory, or no such kind of it.
    """
    descriptor = os.memfd_create("moe_runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor, memoryview(mmap.mmap(descriptor, num_bytes))
    except OSError:
        os.close(descriptor)
        raise


def map_segment(descriptor: int, num_bytes: int) -> memoryview:
    """The memory of a segment that a peer created.

    Raises:
        OSError: If it is no segment, has another size, or could shrink under its users.
        ValueError: If the size is none that a segment can have.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != _SEALS or os.fstat(descriptor).st_size != num_bytes:
        raise OSError(f"expected a sealed segment of {num_bytes} bytes")
    return memoryview(mmap.mmap(descriptor, num_bytes))


class FreeRanges:
    """Which parts of a segment are free; takes the first that fits, so that memory in the caches is used again."""

    def __init__(self, num_bytes: int) -> None:
        # Sorted, and never next to each other.
        self._starts = [0]
        self._stops = [num_bytes]

    def take(self, num_bytes: int) -> int | None:
        """Offset of a range that is the caller's now; None if none is long enough."""
        for i, start in enumerate(self._starts):
            if self._stops[i] - start >= num_bytes:
                self._starts[i] += num_bytes
                if self._starts[i] == self._stops[i]:
                    del self._starts[i], self._stops[i]
                return start
        return None

    def give_back(self, start: int, num_bytes: int) -> None:
        """Free a range that was taken."""
        stop = start + num_bytes
        i = bisect.bisect(self._starts, start)
        joins_left = i > 0 and self._stops[i - 1] == start
        joins_right = i < len(self._starts) and self._starts[i] == stop
        if joins_left and joins_right:
            self._stops[i - 1] = self._stops[i]
            del self._starts[i], self._stops[i]
        elif joins_left:
            self._stops[i - 1] = stop
        elif joins_right:
            self._starts[i] = start
        else:
            self._starts.insert(i, start)
            self._stops.insert(i, stop)
