"""Staging buffers: merged rows, turns, growth and its limit, on ordinary memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.experts.staging_buffers import MIN_BUFFER_BYTES, StagingBuffers


class NotedCopy:
    """A copy that is done when somebody waits for it, and remembers that."""

    def __init__(self, name: str, waits: list[str]) -> None:
        self._name = name
        self._waits = waits

    def synchronize(self) -> None:
        self._waits.append(self._name)


class Allocations:
    """Gives memory, and notes how much."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, num_bytes: int) -> Tensor:
        self.sizes.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)


def rows(num_rows: int, value: float = 1.0) -> Tensor:
    """Rows of 1 KiB each."""
    return torch.full((num_rows, 256), value)


def test_parts_lie_one_after_the_other_in_their_shape_and_dtype() -> None:
    buffers = StagingBuffers(Allocations())
    parts = [torch.tensor([[1.0, 2.0]]), torch.empty(0, 2), torch.tensor([[3.0, 4.0], [5.0, 6.0]])]
    staged = buffers.fill([part.bfloat16() for part in parts], NotedCopy("a", []))
    assert staged.dtype == torch.bfloat16
    assert staged.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert staged.is_contiguous()


def test_columns_of_rows_are_staged_without_the_others() -> None:
    buffers = StagingBuffers(Allocations())
    staged = buffers.fill([torch.arange(6.0).reshape(2, 3)[:, 1:]], NotedCopy("a", []))
    assert staged.tolist() == [[1, 2], [4, 5]]


def test_buffers_take_turns_and_keep_their_memory() -> None:
    allocations = Allocations()
    buffers = StagingBuffers(allocations, num_buffers=2)
    places = [buffers.fill([rows(3)], NotedCopy(str(i), [])).data_ptr() for i in range(5)]
    assert places[0] != places[1]
    assert places == [places[0], places[1]] * 2 + [places[0]]
    assert allocations.sizes == [MIN_BUFFER_BYTES, MIN_BUFFER_BYTES]


def test_a_buffer_is_not_filled_before_the_copy_from_it_is_done() -> None:
    waits: list[str] = []
    buffers = StagingBuffers(Allocations(), num_buffers=2)
    waited = []
    for name in "abcd":
        buffers.fill([rows(1)], NotedCopy(name, waits))
        waited.append("".join(waits))
    assert waited == ["", "", "a", "ab"]


def test_rows_in_one_buffer_stay_while_the_other_is_filled() -> None:
    buffers = StagingBuffers(Allocations(), num_buffers=2)
    first = buffers.fill([rows(2, 1.0)], NotedCopy("a", []))
    buffers.fill([rows(2, 2.0)], NotedCopy("b", []))
    assert torch.equal(first, rows(2, 1.0))


def test_buffers_grow_to_powers_of_two_and_never_shrink() -> None:
    allocations = Allocations()
    buffers = StagingBuffers(allocations, num_buffers=1)
    for num_rows in (64, 65, 128, 129, 1):
        buffers.fill([rows(num_rows)], NotedCopy("a", []))
    assert allocations.sizes == [64 << 10, 128 << 10, 256 << 10]
    assert buffers.num_bytes == 256 << 10


def test_rows_beyond_the_limit_get_memory_of_their_own_and_take_no_turn() -> None:
    waits: list[str] = []
    allocations = Allocations()
    buffers = StagingBuffers(allocations, num_buffers=1, max_buffer_bytes=128 << 10)
    buffers.fill([rows(128)], NotedCopy("a", waits))
    staged = buffers.fill([rows(128, 2.0), rows(1, 3.0)], NotedCopy("b", waits))
    assert torch.equal(staged, torch.cat([rows(128, 2.0), rows(1, 3.0)]))
    assert allocations.sizes == [128 << 10]
    assert waits == []


def test_no_rows_are_staged_as_no_rows() -> None:
    buffers = StagingBuffers(Allocations())
    assert buffers.fill([torch.empty(0, 3)], NotedCopy("a", [])).shape == (0, 3)
