"""A checkpoint that lacks a part of the model is refused, rather than filled with random values."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from moe_runtime.errors import WeightsError

_GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture
def path(tmp_path):
    return zoo.save("mixtral", tmp_path / "mixtral")


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of several files."""
    zoo.built("mixtral").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def rewrite(path, **tensors):
    """Replace tensors of a checkpoint of one file; None removes one."""
    file = path / "model.safetensors"
    changed = {**load_file(file), **tensors}
    save_file({key: each for key, each in changed.items() if each is not None}, file, metadata={"format": "pt"})


def refusal(path, runtime, **options):
    with pytest.raises(WeightsError) as caught:
        moe_hf.load(path, runtime=runtime, **options)
    assert not runtime.config.layers
    return str(caught.value)


def test_a_tensor_that_is_missing_outside_of_the_experts_is_named(path, runtime):
    rewrite(path, **{_GATE: None})
    assert refusal(path, runtime).startswith(
        f"{path}: expected every tensor of the model, found none for model.layers.0.mlp.gate.weight; "
    )


def test_of_many_missing_tensors_the_first_are_named_and_the_others_counted(path, runtime):
    keys = load_file(path / "model.safetensors")
    rewrite(path, **dict.fromkeys(key for key in keys if "self_attn" in key))
    assert (
        "found none for model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.o_proj.weight, "
        "model.layers.0.self_attn.q_proj.weight (and 5 more)"
    ) in refusal(path, runtime)


def test_a_tensor_that_is_another_one_s_may_be_missing(tmp_path, runtime):
    config = zoo.built("mixtral").config
    config.tie_word_embeddings = True
    tied = transformers.MixtralForCausalLM(config).eval()
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = moe_hf.load(tmp_path / "tied", runtime=runtime)
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)


def test_a_class_with_a_head_that_the_checkpoint_lacks_is_refused(path, runtime):
    said = refusal(path, runtime, auto_class=transformers.AutoModelForSequenceClassification)
    assert "found none for score.weight" in said


def test_a_tensor_of_another_shape_outside_of_the_experts_is_named(path, runtime):
    rewrite(path, **{"model.norm.weight": torch.ones(3)})
    assert refusal(path, runtime) == (f"{path}: model.norm.weight: expected shape [32], as config.json says, found [3]")


def test_a_tensor_of_another_shape_is_left_to_a_caller_who_asks_for_that(path, runtime):
    rewrite(path, **{"model.norm.weight": torch.ones(3)})
    model = moe_hf.load(path, runtime=runtime, options={"ignore_mismatched_sizes": True})
    assert model.model.norm.weight.shape == (32,)


def test_a_file_that_the_index_names_and_that_is_gone_is_named(sharded, runtime):
    gone = max(sharded.glob("*.safetensors"))
    gone.unlink()
    assert refusal(sharded, runtime).startswith(f"{gone}: expected a safetensors file of the checkpoint, found none")


def test_a_file_that_is_cut_short_is_named(sharded, runtime):
    cut = max(sharded.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-8])
    assert refusal(sharded, runtime).startswith(f"{cut}: expected a safetensors file of the checkpoint, found none or")


def test_a_broken_configuration_names_the_folder(path, runtime):
    (path / "config.json").write_text("{")
    assert refusal(path, runtime).startswith(f"{path}: expected a config.json of transformers, found a broken one")


def test_a_folder_that_is_not_there_is_named(tmp_path, runtime):
    assert str(tmp_path / "none") in refusal(tmp_path / "none", runtime)
