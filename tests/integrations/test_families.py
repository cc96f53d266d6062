"""Every class of transformers that holds experts is one that a family knows, or one that is refused."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fakes import zoo
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.families import DecoratedFamily, expert_modules, family_of
from moe_runtime.experts.checkpoints.internals import model_on_meta
from moe_runtime.experts.checkpoints.unknown import looks_like_experts

#: What a class of experts, or an attribute that holds them, is called in the sources of transformers.
_NAMED_LIKE_EXPERTS = re.compile(
    r"^class \w*(Experts?|MoE|Moe)(GLU|MLP)?\(|self\.experts\s*=|num_experts", re.MULTILINE
)
#: Folders that say num_experts without having any, and why.
_WITHOUT_EXPERTS = {"bamba": "an argument of a loss that it copies and never computes"}
#: Folders whose experts are refused, with the changes under which a tiny model has some.
_REFUSED = {
    "doge": {"is_moe": True, "num_experts": 16},
    "nllb_moe": {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "vitpose_backbone": {"num_experts": 6, "part_features": 8, "image_size": [16, 16], "patch_size": [4, 4]},
}  # fmt: skip
_REFUSED_HEADS = {"doge": "DogeForCausalLM", "nllb_moe": "NllbMoeForConditionalGeneration",
                  "vitpose_backbone": "VitPoseBackbone"}  # fmt: skip


def _folders_with_experts() -> list[str]:
    files = sorted(zoo.MODELS.glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if _NAMED_LIKE_EXPERTS.search(file.read_text())})


def _classes(folder: str) -> list[type[nn.Module]]:
    found: list[type[nn.Module]] = []
    for file in sorted(zoo.MODELS.glob(f"{folder}/modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
        own = (
            value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
        )
        found += [value for value in own if issubclass(value, nn.Module)]
    return found


def test_every_folder_with_experts_is_decorated_adapted_or_refused() -> None:
    expected = {*zoo.decorated(), *zoo.ADAPTED, *_REFUSED, *_WITHOUT_EXPERTS}
    assert set(_folders_with_experts()) == expected
    assert len(zoo.decorated()) == 64


@pytest.mark.parametrize("folder", zoo.decorated())
def test_a_decorated_class_belongs_to_the_decorated_family(folder: str) -> None:
    known = [found for found in _classes(folder) if isinstance(family_of(found), DecoratedFamily)]
    sources = "".join(file.read_text() for file in zoo.MODELS.glob(f"{folder}/modeling_*.py"))
    assert len(known) == sources.count("\n@use_experts_implementation")


@pytest.mark.parametrize("folder", zoo.ADAPTED)
def test_an_adapted_family_has_exactly_one_class_and_it_is_not_taken_for_a_decorated_one(folder: str) -> None:
    known = [family_of(found) for found in _classes(folder) if family_of(found) is not None]
    assert [type(family).__module__.rpartition(".")[2] for family in known] == [folder]


@pytest.mark.parametrize("folder", zoo.families())
def test_no_module_of_a_supported_model_is_taken_for_unknown_experts(folder: str) -> None:
    assert expert_modules(zoo.bare(folder))


@pytest.mark.parametrize("folder", sorted(_REFUSED))
def test_a_model_with_other_experts_is_refused_by_name(folder: str) -> None:
    (model_class,) = (found for found in _classes(folder) if found.__name__ == _REFUSED_HEADS[folder])
    assert issubclass(model_class, PreTrainedModel)
    model = model_on_meta(model_class, zoo.shrunk(model_class.config_class, _REFUSED[folder]), torch.float32)
    with pytest.raises(
        UnsupportedModelError, match=r"^\w+: the experts of \w+ at [\w.]+ cannot live in other processes"
    ) as caught:
        expert_modules(model)
    assert "switch_transformers" in str(caught.value)


def test_a_class_that_is_only_called_experts_is_refused_and_its_name_said() -> None:
    class HomeMadeExperts(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(2, 2), HomeMadeExperts())
    with pytest.raises(UnsupportedModelError, match="HomeMadeExperts at 1 cannot live in other processes: no family"):
        expert_modules(model)
    assert looks_like_experts("model.layers.0.mlp.experts", nn.ModuleList)
    assert not looks_like_experts("model.layers.0.mlp.shared_experts", nn.Linear)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="Linear: expected a model with experts of a supported family, found none"
    ):
        expert_modules(nn.Linear(2, 2))
