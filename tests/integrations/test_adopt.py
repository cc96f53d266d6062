"""A model in memory hands its experts over, and goes on as it was."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from fakes.prompts import prompt
from moe_runtime.errors import ConfigError, UnsupportedModelError
from moe_runtime.launch.runtime import serve


def logits(model):
    with torch.no_grad():
        return model(**prompt()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_logits_are_bit_equal_to_those_before(name, dtype, runtime):
    model = zoo.built(name).to(dtype)
    before = logits(model)
    assert moe_hf.adopt(model, runtime, experts_per_actor=2) is model
    assert torch.equal(logits(model), before)


def test_its_experts_are_freed_here_and_the_rest_is_frozen(runtime):
    model = zoo.built("mixtral").train()
    moe_hf.adopt(model, runtime)
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_model_of_the_same_configuration_keeps_its_experts(runtime):
    model = zoo.built("mixtral")
    other = copy.deepcopy(model)
    other.config = model.config
    before = logits(other)
    moe_hf.adopt(model, runtime)
    assert torch.equal(logits(other), before)


def test_its_files_are_private_and_gone_when_it_is_closed(runtime, state_folder):
    model = moe_hf.adopt(zoo.built("mixtral"), runtime)
    (folder,) = (state_folder / "adopted").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    moe_hf.close(model)
    assert not list((state_folder / "adopted").iterdir())


def test_a_runtime_loses_its_layers_when_it_is_closed_and_goes_on_with_others(runtime, tmp_path):
    other = zoo.built("qwen3_moe")
    before = logits(other)
    path = zoo.save("mixtral", tmp_path / "mixtral")
    for _ in range(2):
        moe_hf.close(moe_hf.adopt(zoo.built("mixtral"), runtime))
        assert not runtime.config.layers
    loaded = moe_hf.load(path, runtime=runtime)
    first = logits(loaded)
    adopted = moe_hf.adopt(zoo.built("mixtral"), runtime)
    moe_hf.adopt(other, runtime)
    moe_hf.close(adopted)
    assert torch.equal(logits(other), before)
    assert torch.equal(logits(loaded), first)
    moe_hf.close(loaded)
    # What was loaded stays, for the next who loads it; what was adopted goes with its model.
    assert len(runtime.config.layers) == len(moe_hf.experts(other).layers) + len(
        moe_hf.experts(moe_hf.load(path, runtime=runtime)).layers
    )


def test_a_runtime_loses_the_layers_of_a_model_that_is_forgotten(runtime, state_folder):
    model = moe_hf.adopt(zoo.built("mixtral"), runtime)
    assert runtime.config.layers
    del model
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "moe-runtime-give-back":
            thread.join()
    assert not runtime.config.layers
    assert not list((state_folder / "adopted").iterdir())


def test_its_files_go_also_when_the_runtime_has_ended(state_folder, caplog):
    with serve({"name": "ended", "router": {"replicas": 0}, "layers": {}}, ray=False) as runtime:
        model = moe_hf.adopt(zoo.built("mixtral"), runtime)
    moe_hf.close(model)
    assert not list((state_folder / "adopted").iterdir())
    assert not caplog.records


def test_its_files_go_and_it_is_said_when_its_layers_cannot(runtime, state_folder, caplog):
    model = moe_hf.adopt(zoo.built("mixtral"), runtime)
    runtime.remove_layers([*runtime.config.layers])
    moe_hf.close(model)
    assert not list((state_folder / "adopted").iterdir())
    assert "cannot be removed: expected layers of the runtime, which has none" in caplog.text


def test_files_that_a_killed_process_left_are_removed_by_the_next(runtime, state_folder):
    left = state_folder / "adopted" / "left"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    first = moe_hf.adopt(zoo.built("mixtral"), runtime)
    assert not left.exists()
    second = moe_hf.adopt(zoo.built("mixtral"), runtime)
    assert len(list((state_folder / "adopted").iterdir())) == 2
    assert torch.equal(logits(first), logits(second))


def test_a_folder_of_the_caller_is_used_and_left(runtime, tmp_path):
    model = zoo.built("mixtral")
    before = logits(model)
    moe_hf.adopt(model, runtime, folder=tmp_path / "shared")
    assert torch.equal(logits(model), before)
    moe_hf.close(model)
    assert (tmp_path / "shared" / "model.safetensors.index.json").exists()


def test_a_folder_that_holds_something_is_refused(runtime, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="folder: expected a new or empty folder, found mine"):
        moe_hf.adopt(zoo.built("mixtral"), runtime, folder=tmp_path)


def test_parameters_that_two_layers_share_are_right_in_both(runtime):
    model = zoo.built("mixtral")
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.down_proj = first.down_proj
    before = logits(model)
    moe_hf.adopt(model, runtime)
    assert torch.equal(logits(model), before)


def test_parameters_that_are_not_in_memory_are_refused(runtime):
    model = zoo.built("mixtral")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: expected a parameter in"
    ):
        moe_hf.adopt(model, runtime)


def test_quantised_parameters_are_refused(runtime):
    model = zoo.built("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj: expected a plain parameter .*float8_e4m3fn"):
        moe_hf.adopt(model, runtime)


def test_parameters_of_several_dtypes_are_refused(runtime):
    model = zoo.built("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.double())
    with pytest.raises(UnsupportedModelError, match="expected parameters of one dtype, found"):
        moe_hf.adopt(model, runtime)


def test_a_model_is_adopted_once(runtime):
    model = moe_hf.adopt(zoo.built("mixtral"), runtime)
    with pytest.raises(UnsupportedModelError, match="whose experts live in actors already"):
        moe_hf.adopt(model, runtime)


def test_what_is_no_model_of_transformers_is_refused(runtime):
    with pytest.raises(UnsupportedModelError, match="expected a model of transformers, found Linear"):
        moe_hf.adopt(torch.nn.Linear(2, 2), runtime)


def test_a_model_that_cannot_be_adopted_is_as_it_was_and_leaves_nothing(runtime, state_folder):
    other = moe_hf.adopt(zoo.built("mixtral"), runtime, name="taken")
    model = zoo.built("mixtral")
    before = logits(model)
    files = list((state_folder / "adopted").iterdir())
    with pytest.raises(ConfigError, match="name: expected one under which the runtime has no layers, found 'taken'"):
        moe_hf.adopt(model, runtime, name="taken")
    assert torch.equal(logits(model), before)
    assert list((state_folder / "adopted").iterdir()) == files
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
