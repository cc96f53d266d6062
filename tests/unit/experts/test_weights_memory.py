"""Memory for weights is theirs alone, aligned as torch's own, and of any shape and dtype."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.experts.weights_memory import WeightsMemory

_CHUNK_FLOATS = (64 << 20) // 4


@pytest.mark.parametrize("shape", [(3, 7), (1, 0), (129, 1001), (1, 3, 257, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_has_the_shape_and_dtype_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = WeightsMemory().empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()


def test_tensors_do_not_overlap_and_start_where_torch_lets_its_own_start() -> None:
    memory = WeightsMemory()
    tensors = [memory.empty((100_001 + number,), torch.bfloat16) for number in range(5)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


def test_a_tensor_larger_than_a_chunk_gets_memory_of_its_own() -> None:
    memory = WeightsMemory()
    before, large = memory.empty((50_000,), torch.float32), memory.empty((_CHUNK_FLOATS + 1,), torch.float32)
    before.fill_(1.0)
    large[-1] = 2.0
    assert (before.sum().item(), large[-1].item()) == (50_000.0, 2.0)


def test_a_product_with_weights_that_lie_there_has_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, rows = torch.randn(768, 512, generator=generator), torch.randn(5, 512, generator=generator)
    moved = WeightsMemory().empty((768, 512), torch.float32).copy_(weights)
    assert torch.equal(rows @ moved.t(), rows @ weights.t())
