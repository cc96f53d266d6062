from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from moe_runtime.config.gates import MultiGateConfig
from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

EXAMPLES = settings(max_examples=50)

TASKS = ["read", "write", "sum"]


def multi_gate(in_features=2, num_logits=2, **options):
    config = MultiGateConfig(kind="multi", tasks=TASKS, **options)
    return build_gate(config, GateShape(in_features, num_logits), seed=0)


def test_each_row_of_a_mixed_batch_gets_its_own_gates_logits():
    gate = multi_gate(bias=True)
    gate.weight.data.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]]))
    gate.bias.data.copy_(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -1.0]]))
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    logits = gate(tokens, tasks=torch.tensor([1, 0, 2, 1]))
    assert logits.tolist() == [[2.5, 1.0], [3.0, 4.0], [22.0, -1.0], [8.5, 7.0]]


@EXAMPLES
@given(tasks=st.lists(st.integers(0, 2), max_size=40), bias=st.booleans())
def test_mixed_batch_is_the_loop_over_its_rows(tasks, bias):
    gate = multi_gate(in_features=5, num_logits=4, bias=bias)
    if bias:
        gate.bias.data.copy_(torch.arange(12.0).view(3, 4))
    tokens = torch.randn(len(tasks), 5, generator=torch.Generator().manual_seed(0))
    logits = gate(tokens, tasks=torch.tensor(tasks, dtype=torch.int64))
    rows = [F.linear(row, gate.weight[t], gate.bias[t] if bias else None) for row, t in zip(tokens, tasks, strict=True)]
    assert torch.allclose(logits, torch.stack(rows) if rows else torch.zeros(0, 4), atol=1e-5)


def test_batch_of_one_task_is_one_linear_gate_to_the_bit():
    gate = multi_gate(in_features=5, num_logits=4)
    tokens = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(tokens, tasks=torch.full((6,), 2)), F.linear(tokens, gate.weight[2]))


def test_only_the_gates_of_tasks_in_the_batch_learn():
    gate = multi_gate()
    gate(torch.ones(4, 2), tasks=torch.tensor([2, 0, 2, 0])).sum().backward()
    assert gate.weight.grad.tolist() == [[[2.0, 2.0]] * 2, [[0.0, 0.0]] * 2, [[2.0, 2.0]] * 2]


def test_logits_are_the_same_with_a_gradient_and_without():
    gate = multi_gate(in_features=5, num_logits=4, bias=True)
    tokens = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    tasks = torch.tensor([0, 2, 1, 1, 0, 2])
    with torch.inference_mode():
        logits = gate(tokens, tasks=tasks)
    assert torch.equal(gate(tokens, tasks=tasks), logits)


def test_names_of_tasks_are_in_the_order_of_the_parameters():
    gate = multi_gate(default_task="write")
    assert gate.tasks == ("read", "write", "sum")
    assert gate.default_task == "write"
    assert gate.weight.shape == (3, 2, 2)


def test_batch_without_tasks_is_of_the_default_task():
    gate = multi_gate(default_task="write")
    tokens = torch.ones(3, 2)
    assert torch.equal(gate(tokens), gate(tokens, tasks=torch.ones(3, dtype=torch.int64)))


def test_batch_without_tasks_is_refused_where_there_is_no_default():
    with pytest.raises(InvalidRequestError, match="expected the task of each token, one of 'read', 'write', 'sum'"):
        multi_gate()(torch.ones(3, 2))


@pytest.mark.parametrize("task", [-1, 3])
def test_task_that_there_is_not_is_refused(task):
    with pytest.raises(InvalidRequestError, match="tasks: expected places in the gate's 3 tasks, 0 to 2"):
        multi_gate()(torch.ones(2, 2), tasks=torch.tensor([0, task]))


def test_tasks_of_another_number_of_tokens_are_refused():
    with pytest.raises(ShapeError, match=r"tasks: expected one per token, shape \(3,\), found \(2,\)"):
        multi_gate()(torch.ones(3, 2), tasks=torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_tasks_that_are_no_integers_are_refused(dtype):
    with pytest.raises(InvalidRequestError, match=f"tasks: expected integers, found {dtype}"):
        multi_gate()(torch.ones(2, 2), tasks=torch.ones(2, dtype=dtype))
