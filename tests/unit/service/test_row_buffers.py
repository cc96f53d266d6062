"""Memory for expert rows is used again, never by two batches at once."""

from __future__ import annotations

import torch

from moe_runtime.service.row_buffers import RowBuffers

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
