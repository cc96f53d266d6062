"""What adapters send to experts and what stays behind, with experts and values by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import zoo
from moe_runtime.experts.checkpoints.adapters.dbrx import DbrxFamily
from moe_runtime.experts.checkpoints.adapters.jetmoe import JetMoeFamily
from moe_runtime.experts.checkpoints.adapters.llama4 import Llama4Family
from moe_runtime.experts.checkpoints.adapters.longcat_flash import LongcatFlashFamily
from moe_runtime.experts.checkpoints.adapters.loops import sum_by_expert
from moe_runtime.experts.checkpoints.adapters.switch_transformers import SwitchTransformersFamily
from moe_runtime.experts.checkpoints.families import ParameterRows, expert_modules


class TenfoldExperts:
    """Expert e multiplies by ``10 ** e``; what it was asked is kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[float]], list[list[int]]]] = []

    def __call__(self, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        self.calls.append((hidden.tolist(), expert_ids.tolist()))
        return hidden.repeat_interleave(expert_ids.shape[1], dim=0) * 10.0 ** expert_ids.reshape(-1, 1)


@pytest.fixture
def experts() -> TenfoldExperts:
    return TenfoldExperts()


def test_rows_are_added_in_the_order_of_their_experts_and_rounded_each_time() -> None:
    # 256 + 1 is 256 in bfloat16, so that only 1 + 1 first gives 258; the choices are in another order.
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    weights = torch.ones(1, 3, dtype=torch.bfloat16)
    summed = [
        sum_by_expert(rows, torch.tensor([ids]), weights, dtype=torch.bfloat16).item() for ids in ([2, 0, 1], [0, 2, 1])
    ]
    assert summed == [258.0, 256.0]


def test_a_token_that_a_switch_dropped_does_not_travel(experts: TenfoldExperts) -> None:
    module: Any = SimpleNamespace()
    SwitchTransformersFamily().bind(module, experts)
    hidden = torch.tensor([[1.0], [2.0], [3.0]])
    mask = torch.tensor([[[0, 1]], [[0, 0]], [[1, 0]]])
    outputs = module.forward(hidden, mask, torch.tensor([[0.5], [0.5], [0.25]]))
    assert experts.calls == [([[1.0], [3.0]], [[1], [0]])]
    assert outputs.tolist() == [[5.0], [0.0], [0.75]]


def test_a_switch_that_dropped_all_tokens_asks_no_expert(experts: TenfoldExperts) -> None:
    module: Any = SimpleNamespace()
    SwitchTransformersFamily().bind(module, experts)
    outputs = module.forward(torch.ones(2, 1), torch.zeros(2, 1, 4, dtype=torch.long), torch.ones(2, 1))
    assert experts.calls == []
    assert outputs.tolist() == [[0.0], [0.0]]


def test_zero_experts_of_longcat_stay_behind(experts: TenfoldExperts) -> None:
    module: Any = SimpleNamespace(num_routed_experts=2)
    LongcatFlashFamily().bind(module, experts)
    hidden = torch.tensor([[1.0], [2.0]])
    outputs = module.forward(hidden, torch.tensor([[3, 1], [2, 3]]), torch.tensor([[0.5, 0.25], [0.5, 1.0]]))
    assert experts.calls == [([[1.0]], [[1]])]
    assert outputs.tolist() == [[0.5 * 1 + 0.25 * 10], [0.5 * 2 + 1.0 * 2]]


def test_zero_experts_alone_ask_no_expert(experts: TenfoldExperts) -> None:
    module: Any = SimpleNamespace(num_routed_experts=2)
    LongcatFlashFamily().bind(module, experts)
    assert module.forward(torch.ones(1, 1), torch.tensor([[2]]), torch.ones(1, 1)).tolist() == [[1.0]]
    assert experts.calls == []


def test_llama_4_scales_what_it_sends_by_the_sigmoid_of_the_score(experts: TenfoldExperts) -> None:
    logits = torch.tensor([[0.0, 9.0, -1.0]])
    scores = torch.tensor([[0.5, 0.75, 0.0]])
    module: Any = SimpleNamespace(
        hidden_dim=1, top_k=2, router=lambda _tokens: (scores, logits), shared_expert=torch.zeros_like
    )
    Llama4Family().bind(module, experts)
    outputs, told = module.forward(torch.tensor([[[4.0]]]))
    assert experts.calls == [([[2.0], [3.0]], [[0], [1]])]
    assert outputs.tolist() == [[2.0 * 1 + 3.0 * 10]]
    assert told is logits


def test_jetmoe_sends_each_token_to_the_experts_that_its_router_sorted_it_to(experts: TenfoldExperts) -> None:
    # Two tokens with two choices each, (1, 0) and (0, 2), as the router sorts them: experts 0, 0, 1, 2.
    routed = (
        torch.tensor([1, 2, 0, 3]),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([0.25, 0.5, 0.75, 0.5]),
        [2, 1, 1],
        None,
    )
    module: Any = SimpleNamespace(router=lambda _tokens: routed, bias=torch.tensor([1000.0]))
    JetMoeFamily().bind(module, experts)
    outputs = module.forward(torch.tensor([[[1.0], [2.0]]]))
    assert experts.calls == [([[1.0], [2.0]], [[1, 0], [0, 2]])]
    assert outputs.tolist() == [[[0.75 * 10 + 0.25 * 1 + 1000], [0.5 * 2 + 0.5 * 200 + 1000]]]


def test_an_expert_of_dbrx_is_a_block_of_rows_of_each_matrix() -> None:
    model = zoo.bare("dbrx")
    path, family = next(iter(expert_modules(model).items()))
    assert isinstance(family, DbrxFamily)
    module = model.get_submodule(path)
    assert family.parameters(module, 1)["mlp.w2"] == ParameterRows("mlp.w2", 64, 128)
    assert family.single(module).get_parameter("mlp.w2").shape == (64, 32)


@pytest.mark.parametrize("name", [*zoo.ADAPTED, "mixtral", "gpt_oss", "muse_spark", "nemotron_h", "ernie4_5_vl_moe"])
def test_one_expert_has_exactly_the_parameters_that_are_read_for_it(name: str) -> None:
    model = zoo.bare(name)
    for path, family in expert_modules(model).items():
        module = model.get_submodule(path)
        single = family.single(module)
        owned = family.parameters(module, family.num_experts(module) - 1)
        assert set(owned) == {parameter for parameter, _ in single.named_parameters()}
        assert not any(parameter.requires_grad for parameter in single.parameters())
        assert not single.training
        for parameter, rows in owned.items():
            whole = module.get_parameter(rows.parameter)
            start, stop = (rows.start, rows.stop) if rows.start is not None else (0, whole.shape[0])
            assert whole[start:stop].shape == single.get_parameter(parameter).shape
