"""Models without their experts: what is left of them, and that classes are as they were afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fakes import zoo
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.families import RowsOf, expert_modules, family_of, weighted_sum
from moe_runtime.experts.checkpoints.skeleton import without_experts


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    whole: nn.Module = AutoModelForCausalLM.from_pretrained(
        zoo.save("mixtral", tmp_path), experts_implementation="grouped_mm"
    )
    return whole.eval()


def build(folder: Path) -> nn.Module:
    return MixtralForCausalLM(AutoConfig.from_pretrained(folder))


def names_of_experts(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "experts" in name]


def test_model_built_without_experts_has_all_other_parameters(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path)
    with without_experts([MixtralExperts]):
        skeleton = build(tmp_path)
    whole = {name for name, _ in build(tmp_path).named_parameters()}
    assert names_of_experts(skeleton) == []
    assert {name for name, _ in skeleton.named_parameters()} == {name for name in whole if ".experts." not in name}
    assert type(skeleton.get_submodule("model.layers.0.mlp.experts")) is MixtralExperts


def test_classes_are_as_before_when_building_fails(tmp_path: Path) -> None:
    before = MixtralExperts.__init__
    with pytest.raises(KeyboardInterrupt), without_experts([MixtralExperts, MixtralExperts]):
        raise KeyboardInterrupt
    assert MixtralExperts.__init__ is before
    assert len(names_of_experts(build(zoo.save("mixtral", tmp_path)))) == 4


def test_other_threads_build_whole_models_meanwhile(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path)
    with without_experts([MixtralExperts]), ThreadPoolExecutor(1) as other:
        assert len(names_of_experts(other.submit(build, tmp_path).result())) == 4
        assert names_of_experts(build(tmp_path)) == []


def test_two_threads_that_build_skeletons_leave_the_classes_as_they_were(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path)
    before = MixtralExperts.__init__

    def build_skeleton(_: int) -> nn.Module:
        with without_experts([MixtralExperts]):
            return build(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        skeletons = list(threads.map(build_skeleton, range(8)))
    assert [names_of_experts(skeleton) for skeleton in skeletons] == [[]] * 8
    assert MixtralExperts.__init__ is before


@torch.inference_mode()
def test_bound_module_asks_for_rows_and_weighs_and_sums_them(model: nn.Module) -> None:
    """Expert e answers with e + 1 times the token; the first token chooses 0 and 2, with weights 0.75 and 0.25."""
    asked: list[tuple[Tensor, Tensor]] = []

    def rows(hidden: Tensor, expert_ids: Tensor) -> Tensor:
        asked.append((hidden, expert_ids))
        return hidden.repeat_interleave(2, dim=0) * (expert_ids.reshape(-1, 1) + 1)

    experts = model.get_submodule("model.layers.0.mlp.experts")
    family = family_of(type(experts))
    assert family is not None
    family.bind(experts, rows)
    tokens = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    index, weights = torch.tensor([[0, 2], [3, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    # 0.75 * 1 + 0.25 * 3 = 1.5 and 0.5 * 4 + 0.5 * 2 = 3
    assert torch.equal(experts(tokens, index, weights), torch.tensor([[1.5, 3.0], [12.0, 24.0]]))
    assert torch.equal(asked[0][1], index)


@torch.inference_mode()
def test_model_bound_to_its_own_experts_gives_its_own_logits(model: nn.Module) -> None:
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits
    for name, family in expert_modules(model).items():
        family.bind(module := model.get_submodule(name), own_rows(module))
    assert torch.equal(model(tokens).logits, expected)


def own_rows(experts: nn.Module) -> RowsOf:
    """The rows of a module's own experts, in the order of the choices."""
    compute = experts.forward

    def rows(hidden: Tensor, expert_ids: Tensor) -> Tensor:
        repeated = hidden.repeat_interleave(expert_ids.shape[1], dim=0)
        outputs: Tensor = compute(repeated, expert_ids.reshape(-1, 1), torch.ones(len(repeated), 1))
        return outputs

    return rows


def test_sum_of_no_tokens_is_empty() -> None:
    assert weighted_sum(torch.empty(0, 3), torch.empty(0, 2), dtype=torch.float32).shape == (0, 3)


def test_model_without_experts_is_refused() -> None:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=8,
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: expected a model with experts"):
        expert_modules(LlamaForCausalLM(config))
