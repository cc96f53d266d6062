from __future__ import annotations

import pytest
import torch

from moe_runtime.bench.shapes import SHAPES, Shape
from moe_runtime.bench.tokens import spread_evenly, tokens_for

BY_NAME = {shape.name: shape for shape in SHAPES}


def counts(shape: Shape, request: int = 0, *, num_tokens: int = 20000) -> list[int]:
    choices = shape.choices(request, num_tokens=num_tokens, num_experts=8)
    return torch.bincount(choices.flatten(), minlength=8).tolist()


def test_the_gate_sends_tokens_where_they_were_made_for():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    choices = torch.tensor([[3, 1], [0, 7], [5, 2]])
    tokens = tokens_for(weight, choices)
    assert tokens.shape == (3, 32)
    assert tokens.dtype == torch.float32
    assert torch.equal((tokens @ weight.T).topk(2).indices, choices)


def test_tokens_of_another_seed_are_others():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    choices = torch.tensor([[3, 1]])
    assert not torch.equal(tokens_for(weight, choices), tokens_for(weight, choices, seed=1))


def test_even_choices_touch_every_expert_equally_often():
    choices = spread_evenly(16, num_experts=8)
    assert torch.bincount(choices.flatten()).tolist() == [4] * 8
    assert all(len(set(row)) == 2 for row in choices.tolist())


def test_there_are_the_shapes_w0_to_w7():
    assert [shape.name for shape in SHAPES] == [f"W{i}" for i in range(8)]


@pytest.mark.parametrize(
    ("name", "expert_id", "share"),
    [("W0", 0, 1 / 8), ("W1", 0, 0.5), ("W2", 0, 0.368), ("W3", 0, 0.519), ("W4", 1, 0.35), ("W7", 0, 1.0)],
)
def test_a_shape_gives_an_expert_its_share(name: str, expert_id: int, share: float):
    assert counts(BY_NAME[name])[expert_id] / 20000 == pytest.approx(share, abs=0.02)


def test_the_hot_expert_of_w5_moves_every_100_requests():
    shape = BY_NAME["W5"]
    hottest = [max(range(8), key=counts(shape, request).__getitem__) for request in (0, 99, 100, 250)]
    assert hottest == [0, 0, 1, 2]


def test_w6_sends_16_times_as_many_at_once():
    assert BY_NAME["W6"].burst == 16
