"""Folders and files that are not what they should be: refused with the key, the file, and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fakes import zoo
from fakes.changed_checkpoints import change_json, change_tensors, quantise_to_fp8
from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.experts.checkpoints.checkpoint import Checkpoint, open_checkpoint

MODULE = "model.layers.1.mlp.experts"
#: One of expert 2's tensors there.
KEY = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return zoo.save("mixtral", tmp_path / "sharded", shard_size="20kB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return zoo.save("mixtral", tmp_path / "single")


def shard_of(folder: Path, key: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


def set_tensor(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, key: tensor}


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def assert_loading_fails(folder: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Checkpoint(folder).expert(MODULE, 2)
    for word in words:
        assert word in str(caught.value)


def test_missing_shard_names_the_key_and_the_file(sharded: Path) -> None:
    shard = shard_of(sharded, KEY)
    shard.unlink()
    assert_loading_fails(sharded, KEY, shard.name, "no such file")


def test_missing_shard_leaves_experts_of_other_shards_usable(sharded: Path) -> None:
    needed = {shard_of(sharded, KEY.replace("w3", part)) for part in ("w1", "w2", "w3")}
    for shard in set(sharded.glob("*.safetensors")) - needed:
        shard.unlink()
    assert Checkpoint(sharded).expert(MODULE, 2) is not None


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -8])
def test_truncated_shard_names_the_key_and_the_file(sharded: Path, num_bytes: int) -> None:
    shard = shard_of(sharded, KEY)
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    assert_loading_fails(sharded, shard.name, "experts.2.w", "truncated")


def test_shard_without_the_key_that_the_index_says_it_has(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    other = next(name for name in files.values() if name != files[KEY])
    change_json(index, weight_map={**files, KEY: other})
    assert_loading_fails(sharded, KEY, other)


def test_key_that_the_checkpoint_lacks_is_named(single: Path) -> None:
    change_tensors(single, without(KEY))
    assert_loading_fails(single, f"{MODULE}.gate_up_proj", f"{KEY} is missing", "expected 4 tensors", "found 3")


def test_layer_that_the_checkpoint_lacks_is_named(single: Path) -> None:
    change_json(single / "config.json", num_hidden_layers=3)
    assert_loading_fails(single, "model.layers.2.mlp.experts")


def test_checkpoint_of_more_experts_than_its_configuration_is_refused(single: Path) -> None:
    change_json(single / "config.json", num_local_experts=3)
    assert_loading_fails(single, "expected 3 tensors", "found 4")


def test_tensor_of_another_shape_names_the_key_the_file_and_both_shapes(single: Path) -> None:
    change_tensors(single, set_tensor(KEY, torch.zeros(64, 16)))
    assert_loading_fails(single, KEY, "model.safetensors", "[1, 64, 32]", "[1, 64, 16]")


@pytest.mark.parametrize("width", [48, 80])
def test_part_that_is_too_narrow_or_too_wide_is_refused(single: Path, width: int) -> None:
    change_tensors(single, set_tensor(KEY, torch.zeros(width, 32)))
    assert_loading_fails(single, KEY)


@pytest.mark.parametrize("shape", [(), (64,), (1, 64, 32)])
def test_tensor_of_another_number_of_dimensions_is_refused(single: Path, shape: tuple[int, ...]) -> None:
    change_tensors(single, set_tensor(KEY, torch.zeros(shape)))
    assert_loading_fails(single, KEY)


def test_fused_tensor_with_fewer_experts_is_refused(tmp_path: Path) -> None:
    key = "model.layers.1.block_sparse_moe.input_linear.weight"
    change_tensors(zoo.save("granitemoe", tmp_path), set_tensor(key, torch.zeros(2, 128, 32)))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=rf"{re.escape(key)}"):
        checkpoint.expert(checkpoint.layers[1].module, 3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_not_plain_floats_are_refused(single: Path, dtype: torch.dtype) -> None:
    change_tensors(single, set_tensor(KEY, torch.zeros(64, 32).to(dtype)))
    assert_loading_fails(single, KEY, str(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensor_of_another_float_type_is_cast(single: Path, dtype: torch.dtype) -> None:
    stored = torch.linspace(-1, 1, 64 * 32).reshape(64, 32).to(dtype)
    change_tensors(single, set_tensor(KEY, stored))
    loaded = Checkpoint(single).expert(MODULE, 2).get_parameter("experts.gate_up_proj")
    assert torch.equal(loaded[0, 64:], stored.float())


def test_scales_that_do_not_fit_their_tensor_are_refused(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    quantise_to_fp8(zoo.save("deepseek_v3", tmp_path))
    change_tensors(tmp_path, set_tensor(f"{key}_scale_inv", torch.ones(5, 4)))
    assert_loading_fails(tmp_path, key, "[5, 4]")


def test_scale_that_is_missing_is_named(tmp_path: Path) -> None:
    scale = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    quantise_to_fp8(zoo.save("deepseek_v3", tmp_path))
    change_tensors(tmp_path, without(scale))
    assert_loading_fails(tmp_path, f"{scale} is missing")


def test_quantisation_that_is_not_undone_here_is_refused(single: Path) -> None:
    change_json(single / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"fp8, mxfp4.*'gptq'"):
        Checkpoint(single).expert(MODULE, 0)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_broken_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert_loading_fails(sharded, "model.safetensors.index.json", "weight_map")


def test_broken_single_file_is_named(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"no tensors")
    assert_loading_fails(single, "model.safetensors")


def test_folder_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json and model\.safetensors"):
        open_checkpoint(tmp_path)


def test_folder_without_a_configuration_is_no_checkpoint(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"found no config\.json"):
        open_checkpoint(single)


def test_pickled_weights_are_refused_and_never_read(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(WeightsError, match=r"pickled weights.*save_pretrained"):
        open_checkpoint(single)


def test_gguf_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    for path in (tmp_path, file):
        with pytest.raises(WeightsError, match="moe-runtime upcycle"):
            open_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", '{"model_type": "no_such_model"}', "{}"])
def test_configuration_that_transformers_does_not_know_is_refused(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="expected a configuration that transformers knows"):
        open_checkpoint(single)


def test_configuration_that_is_no_json_is_refused(single: Path) -> None:
    (single / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"expected a config\.json of transformers, found a broken one"):
        open_checkpoint(single)


def test_architecture_that_transformers_does_not_have_is_refused(single: Path) -> None:
    change_json(single / "config.json", architectures=["MixtralForTelepathy"])
    with pytest.raises(UnsupportedModelError, match="MixtralForTelepathy"):
        open_checkpoint(single)
    assert open_checkpoint(single, architecture="MixtralForCausalLM").layers


def test_paths_are_those_of_the_architecture_that_is_asked_for(single: Path) -> None:
    checkpoint = open_checkpoint(single, architecture="MixtralModel")
    assert [layer.module for layer in checkpoint.layers] == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    alone = checkpoint.expert("layers.1.mlp.experts", 2).get_parameter("experts.down_proj")
    assert torch.equal(alone, open_checkpoint(single).expert(MODULE, 2).get_parameter("experts.down_proj"))


def test_module_that_holds_no_experts_is_refused_with_those_that_do(single: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"one of model\.layers\.0\.mlp\.experts to model\.layers\.1"):
        open_checkpoint(single).expert("model.layers.1.mlp", 0)
