"""Memory for expert rows is used again, never by two batches at once."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.service.row_buffers import ExpertRows, RowBuffers

LARGE = (512, 1024)


def test_memory_that_was_given_back_is_lent_again_in_another_shape_and_dtype() -> None:
    buffers = RowBuffers()
    rows = buffers.lend(LARGE, torch.float32)
    where = rows.data_ptr()
    buffers.give_back(rows)
    again = buffers.lend((256, 1024), torch.float64)
    assert (again.data_ptr(), again.shape, again.dtype) == (where, (256, 1024), torch.float64)


def test_two_borrowers_never_share() -> None:
    buffers = RowBuffers()
    first, second = buffers.lend(LARGE, torch.float32), buffers.lend(LARGE, torch.float32)
    buffers.give_back(first)
    third = buffers.lend(LARGE, torch.float32)
    first_is_third = third.data_ptr() == first.data_ptr()
    assert first_is_third
    assert third.data_ptr() != second.data_ptr()


def test_the_smallest_that_fits_is_lent_and_the_largest_are_kept() -> None:
    buffers = RowBuffers(max_kept=2)
    sizes = [(64, 1024), (128, 1024), (256, 1024)]
    lent = [buffers.lend(size, torch.float32) for size in sizes]
    pointers = [rows.data_ptr() for rows in lent]
    for rows in lent:
        buffers.give_back(rows)
    assert buffers.lend((100, 1024), torch.float32).data_ptr() == pointers[1]
    assert buffers.lend((100, 1024), torch.float32).data_ptr() == pointers[2]


def test_what_is_small_is_not_kept() -> None:
    buffers = RowBuffers()
    small = buffers.lend((2, 3), torch.bfloat16)
    assert (small.shape, small.dtype) == ((2, 3), torch.bfloat16)
    buffers.give_back(small)
    assert buffers.lend((0, 4), torch.float32).shape == (0, 4)


@pytest.mark.parametrize("width", [2, 1 << 16])
def test_rows_are_collected_in_plan_order_however_they_arrive(width: int) -> None:
    rows = ExpertRows((4, width), torch.float32, buffers=RowBuffers())
    every = torch.arange(4.0)[:, None].expand(4, width)
    rows.place(range(3, len(every)), every[3:])
    rows.place(range(1), every[:1])
    rows.place(range(1, 3), every[1:3])
    assert torch.equal(rows.collect(), every)
    rows.release()


@pytest.mark.parametrize("width", [2, 1 << 16])
def test_rows_that_never_arrive_leave_the_others_in_place(width: int) -> None:
    rows = ExpertRows((3, width), torch.float32, buffers=RowBuffers())
    rows.place(range(2, 3), torch.full((1, width), 2.0))
    rows.place(range(1), torch.full((1, width), 5.0))
    collected = rows.collect()
    assert collected.shape == (3, width)
    assert collected[[0, 2], 0].tolist() == [5.0, 2.0]


def test_rows_of_a_narrower_dtype_are_collected_in_the_layers() -> None:
    rows = ExpertRows((2, 2), torch.float32, buffers=RowBuffers())
    rows.place(range(2), torch.ones(2, 2, dtype=torch.bfloat16))
    assert rows.collect().dtype == torch.float32


@pytest.mark.parametrize("width", [2, 1 << 16])
def test_scattered_rows_find_their_places_among_neighbours(width: int) -> None:
    every = torch.arange(5.0).repeat_interleave(width).reshape(5, width)
    rows = ExpertRows((5, width), torch.float32, buffers=RowBuffers())
    rows.place(range(1, 3), every[1:3])
    rows.place([0, 4], every[[0, 4]].double())
    rows.place(range(3, 4), every[3:4])
    assert torch.equal(rows.collect(), every)
