"""Segments, slots and who holds them: the parts of shared memory, without a router or a host."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moe_runtime.transport.arena import Arena
from moe_runtime.transport.header_fields import Place
from moe_runtime.transport.near_door import ReplySlot
from moe_runtime.transport.shared_memory import FreeRanges, create_segment, map_segment

PAGE = 4096


@given(st.lists(st.integers(1, 40), max_size=60), st.randoms(use_true_random=False))
def test_ranges_never_overlap_and_all_come_back_as_one(sizes, random):
    free, taken = FreeRanges(100), {}
    for size in sizes:
        start = free.take(size)
        if start is None:
            assert sum(taken.values()) + size > 100 or len(taken) > 0
        else:
            assert 0 <= start <= 100 - size
            assert all(start + size <= other or other + length <= start for other, length in taken.items())
            taken[start] = size
        if taken and random.random() < 0.5:
            start = random.choice(sorted(taken))
            free.give_back(start, taken.pop(start))
    for start, size in taken.items():
        free.give_back(start, size)
    assert free.take(100) == 0
    assert free.take(1) is None


def test_segment_is_seen_by_both_sides_and_cannot_shrink():
    descriptor, ours = create_segment(2 * PAGE)
    theirs = map_segment(descriptor, 2 * PAGE)
    theirs[5] = 7
    assert ours[5] == 7
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(descriptor, 0)
    with pytest.raises(OSError, match="sealed segment of 4096 bytes"):
        map_segment(descriptor, PAGE)
    os.close(descriptor)


def test_memory_that_could_shrink_is_not_mapped():
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    with pytest.raises(OSError, match="sealed segment"):
        map_segment(descriptor, PAGE)
    os.close(descriptor)


def test_slot_is_free_once_nobody_reads_it_and_no_host_has_it():
    arena = Arena()
    arena.add(1, memoryview(bytearray(PAGE)))
    slot = arena.lend(10)
    assert slot.place == Place(1, 0, PAGE)
    view = slot.view(10)
    slot.is_away = True
    assert arena.lend(10) is None
    del view
    assert arena.lend(10) is None
    view = slot.view(10)
    slot.come_back()
    assert arena.lend(10) is None
    del view
    assert arena.lend(PAGE).place == Place(1, 0, PAGE)


def test_view_outlives_its_arena():
    arena = Arena()
    arena.add(1, memoryview(bytearray(PAGE)))
    slot = arena.lend(PAGE)
    view = slot.view(PAGE)
    assert slot.view(PAGE + 1) is None
    del arena, slot
    view[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"


def test_reply_slot_takes_rows_once_and_only_if_they_fit():
    memory = bytearray(PAGE)
    assert not ReplySlot(memoryview(memory)).fill(torch.ones(PAGE))
    assert not ReplySlot(memoryview(memory)).fill(torch.ones(0, 3))
    slot = ReplySlot(memoryview(memory))
    assert slot.fill(torch.arange(3.0))
    assert torch.equal(torch.frombuffer(memory, dtype=torch.float32)[:3], torch.arange(3.0))
    assert not slot.fill(torch.zeros(3))


@pytest.mark.parametrize(
    "pick", [lambda rows: rows, lambda rows: rows[2:], lambda rows: rows.flip(0), lambda rows: rows.t()]
)
def test_reply_rows_that_lie_in_the_request_s_memory_arrive_intact(pick):
    memory = memoryview(bytearray(16 * 4))
    rows = torch.frombuffer(memory, dtype=torch.float32).view(4, 4)
    rows.copy_(torch.arange(16.0).view(4, 4))
    answer = pick(rows)
    expected = answer.clone()
    assert ReplySlot(memory).fill(answer)
    found = torch.frombuffer(memory, dtype=torch.float32, count=expected.numel()).view(expected.shape)
    assert torch.equal(found, expected)
