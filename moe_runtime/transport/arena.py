"""The router's side of shared memory: slots for the rows of requests, in which their replies come back.

A slot is lent to one request at a time. It is free again when no tensor lies in it any more and no host may still
write to it, that is when the reply has come and been dropped. A host that never answers keeps its slots until its
connection ends; the arena goes with the connection, and a late writer then writes to memory that nobody reads.
"""

from __future__ import annotations

import weakref
from collections import deque

from moe_runtime.transport.header_fields import Place
from moe_runtime.transport.shared_memory import FreeRanges

_PAGE_BYTES = 4096


class Slot:
    """A part of shared memory that is lent to one request and its reply."""

    def __init__(self, place: Place, memory: memoryview, arena: Arena) -> None:
        self.place = place
        #: Whether a host may read and write it.
        self.is_away = False
        #: Whether the caller who asked for it has yet to send it.
        self.is_unsent = True
        self._memory = memory
        # Not the arena itself: tensors may outlive the connection, and must not keep all of its memory.
        self._arena = weakref.ref(arena)
        self._views: list[weakref.ref[memoryview]] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody uses it."""
        return not self.is_away and not self._views

    def view(self, num_bytes: int) -> memoryview | None:
        """Its first bytes, None if it has not so many; the slot is in use as long as the view is."""
        if num_bytes > self._memory.nbytes:
            return None
        view = self._memory[:num_bytes]
        self._views.append(weakref.ref(view, self._forget))
        return view

    def come_back(self) -> None:
        """Note that no host may touch it any more."""
        self.is_away = False
        self._look_if_free()

    def _forget(self, view: weakref.ref[memoryview]) -> None:
        # Runs in whatever thread drops the last tensor.
        self._views.remove(view)
        self._look_if_free()

    def _look_if_free(self) -> None:
        arena = self._arena()
        if arena is not None and self.is_free:
            arena.note_free(self)


class Arena:
    """Lends slots of the segments that a host has mapped; owned by the router's thread."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._segments: dict[int, tuple[memoryview, FreeRanges]] = {}
        self._lent: dict[int, Slot] = {}
        # A deque, since tensors are dropped by any thread.
        self._freed: deque[Slot] = deque()

    def add(self, segment_id: int, memory: memoryview) -> None:
        """Lend from this segment, too."""
        self._segments[segment_id] = (memory, FreeRanges(memory.nbytes))
        self.num_bytes += memory.nbytes

    def lend(self, num_bytes: int) -> Slot | None:
        """A slot of at least so many bytes; None if there is none free."""
        self._take_back()
        size = whole_pages(num_bytes)
        for segment_id, (memory, free) in self._segments.items():
            offset = free.take(size)
            if offset is not None:
                slot = Slot(Place(segment_id, offset, size), memory[offset : offset + size], self)
                self._lent[id(slot)] = slot
                return slot
        return None

    def note_free(self, slot: Slot) -> None:
        """Take a slot back at the next opportunity. Thread-safe."""
        self._freed.append(slot)

    def _take_back(self) -> None:
        while self._freed:
            slot = self._freed.popleft()
            # It may have been noted twice, or be in use again.
            if slot.is_free and self._lent.pop(id(slot), None) is not None:
                place = slot.place
                self._segments[place.segment_id][1].give_back(place.offset, place.num_bytes)


def whole_pages(num_bytes: int) -> int:
    """The smallest whole number of pages that holds so many bytes, in bytes."""
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
