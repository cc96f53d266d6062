"""One expert of a checkpoint: bit-equal to the model's own, and nothing but its own tensors read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mxfp4Config

from fakes import zoo
from fakes.changed_checkpoints import (
    change_json,
    change_tensors,
    quantise_to_fp8,
    quantise_to_mxfp4,
)
from moe_runtime.experts.checkpoints import checkpoint as checkpoint_module
from moe_runtime.experts.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moe_runtime.experts.checkpoints.families import weighted_sum

NUM_EXPERTS = zoo.SIZES["num_experts"]
#: Of checkpoints: per expert; the same beside shared experts, and below a dense layer; fused, with biases and without;
#: and without a gate projection.
every_layout = pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h"]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def load_whole(folder: Path, **options: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm", **options)
    return model.eval()


def rows_of(checkpoint: Checkpoint, num_rows: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(num_rows, checkpoint.layers[0].hidden_size, generator=torch.Generator().manual_seed(2))
    return drawn.to(dtype)


def of_one_expert(experts: nn.Module, rows: Tensor, expert: int) -> Tensor:
    """The model's own rows for tokens that all go to one expert with a weight of one."""
    ones = torch.ones(rows.shape[0], 1, dtype=rows.dtype)
    outputs: Tensor = experts(rows, torch.full((rows.shape[0], 1), expert), ones)
    return outputs


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@both_dtypes
@every_layout
@torch.inference_mode()
def test_expert_is_bit_equal_to_the_model_s_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save(name, tmp_path, dtype=dtype))
    model = zoo.reference(name, tmp_path)
    assert checkpoint.dtype == dtype
    for layer in checkpoint.layers:
        assert layer.num_experts == NUM_EXPERTS
        for index in range(layer.num_experts):
            expert = checkpoint.expert(layer.module, index)
            assert not expert.training
            for num_rows in (1, 2, 7, 16):
                rows = rows_of(checkpoint, num_rows, dtype)
                expected = of_one_expert(model.get_submodule(layer.module), rows, index)
                assert torch.equal(expert(rows), expected)


@both_dtypes
@every_layout
@torch.inference_mode()
def test_rows_of_all_experts_weighted_and_summed_are_bit_equal_to_the_layer_s(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(zoo.save(name, tmp_path, dtype=dtype))
    layer = checkpoint.layers[-1]
    tokens, drawn = rows_of(checkpoint, 9, dtype), torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(NUM_EXPERTS, generator=drawn)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=drawn).to(dtype)
    rows = torch.empty(18, layer.hidden_size, dtype=dtype)
    for number in range(NUM_EXPERTS):
        chosen = (index.reshape(-1) == number).nonzero().squeeze(1)
        rows[chosen] = checkpoint.expert(layer.module, number)(tokens[chosen // 2])
    expected = zoo.reference(name, tmp_path).get_submodule(layer.module)(tokens, index, weights)
    assert torch.equal(weighted_sum(rows, weights, dtype=dtype), expected)


@every_layout
def test_hosts_together_read_the_experts_bytes_once_and_each_its_own_keys(name: str, tmp_path: Path) -> None:
    zoo.save(name, tmp_path, shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    hosts = [Checkpoint(tmp_path) for _ in range(NUM_EXPERTS)]
    for index, host in enumerate(hosts):
        for layer in host.layers:
            before = host.bytes_read
            assert bytes_of(host.expert(layer.module, index)) == host.bytes_read - before
    layers = [load_whole(tmp_path).get_submodule(layer.module) for layer in hosts[0].layers]
    assert sum(host.bytes_read for host in hosts) == sum(bytes_of(layer) for layer in layers)
    fused = name in {"gpt_oss", "granitemoe"}
    assert set(hosts[0].keys_read).isdisjoint(hosts[1].keys_read) != fused
    assert all("expert" in key or "sparse_moe" in key for host in hosts for key in host.keys_read)


def test_planning_reads_no_tensor_and_opens_no_shard(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path, shard_size="20kB")
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.plan) == 2 * len(checkpoint.layers)
    assert [layer.module for layer in checkpoint.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert (checkpoint.bytes_read, checkpoint.keys_read) == (0, [])


@both_dtypes
def test_fp8_is_dequantised_for_one_expert_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    quantise_to_fp8(zoo.save("deepseek_v3", tmp_path, dtype=dtype))
    checkpoint = Checkpoint(tmp_path)
    expert = checkpoint.expert(checkpoint.layers[0].module, 2, dtype=dtype)
    stored: dict[str, Tensor] = {}
    change_tensors(tmp_path, lambda tensors: stored.update(tensors) or tensors)

    def plain(part: str) -> Tensor:
        key = f"model.layers.1.mlp.experts.2.{part}_proj.weight"
        scales = stored[f"{key}_scale_inv"].repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
        return (stored[key].float() * scales).to(dtype)

    assert torch.equal(expert.get_parameter("experts.gate_up_proj")[0], torch.cat([plain("gate"), plain("up")]))
    assert torch.equal(expert.get_parameter("experts.down_proj")[0], plain("down"))
    # 3 projections of 64 * 32 bytes, each with 8 * 4 scales of 4 bytes.
    assert checkpoint.bytes_read == 3 * (2048 + 128)
    assert all(".experts.2." in key for key in checkpoint.keys_read)


@torch.inference_mode()
def test_mxfp4_is_dequantised_for_one_expert_alone(tmp_path: Path) -> None:
    quantise_to_mxfp4(zoo.save("gpt_oss", tmp_path, dtype=torch.bfloat16))
    checkpoint = Checkpoint(tmp_path)
    model = load_whole(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    module = checkpoint.layers[1].module
    rows = rows_of(checkpoint, 3, torch.bfloat16)
    expected = of_one_expert(model.get_submodule(module), rows, 3)
    assert torch.equal(checkpoint.expert(module, 3)(rows), expected)
    # 16 bytes of numbers and one exponent for each 32 of 32 * 128 and 64 * 32; two biases of 128 and 32 in bf16.
    assert checkpoint.bytes_read == (128 + 64) * 17 + 2 * (128 + 32)


def test_expert_takes_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save("qwen2_moe", tmp_path, dtype=torch.bfloat16))
    module = checkpoint.layers[0].module
    wide = checkpoint.expert(module, 0, dtype=torch.float32).get_parameter("experts.down_proj")
    assert wide.dtype == torch.float32
    assert torch.equal(wide, checkpoint.expert(module, 0).get_parameter("experts.down_proj").float())


def test_checkpoint_that_names_no_dtype_has_that_of_its_tensors(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path, dtype=torch.bfloat16)
    change_json(tmp_path / "config.json", dtype=None)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.bfloat16 == AutoModelForCausalLM.from_pretrained(tmp_path).dtype
    assert checkpoint.expert(checkpoint.layers[0].module, 0).get_parameter("experts.down_proj").dtype == torch.bfloat16


def test_checkpoint_is_opened_once_until_its_files_change(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path)
    first = open_checkpoint(tmp_path)
    assert open_checkpoint(str(tmp_path)) is first
    change_json(tmp_path / "config.json", dtype="bfloat16")
    assert open_checkpoint(tmp_path) is not first
    assert open_checkpoint(tmp_path).version != first.version


def test_a_copy_has_the_version_of_the_original_and_a_trained_one_has_another(tmp_path: Path) -> None:
    original = zoo.save("mixtral", tmp_path / "original")
    shutil.copytree(original, tmp_path / "copy", copy_function=shutil.copyfile)
    assert open_checkpoint(tmp_path / "copy").version == open_checkpoint(original).version
    shutil.copytree(original, tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    moved = {name: weight + 1e-3 for name, weight in weights.items()}
    save_file(moved, tmp_path / "trained" / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path / "trained").version != open_checkpoint(original).version


def test_experts_of_thousands_share_what_was_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(zoo.save("mixtral", tmp_path))
    plan, model = checkpoint.plan, checkpoint.model
    made: list[str] = []
    monkeypatch.setattr(checkpoint_module, "model_on_meta", lambda *_: made.append("model"))
    monkeypatch.setattr(checkpoint_module, "plan_parameters", lambda *_: made.append("plan"))
    for _ in range(3):
        checkpoint.expert(checkpoint.layers[0].module, 1)
    assert made == []
    assert checkpoint.plan is plan
    assert checkpoint.model is model


def test_experts_of_one_layer_share_no_parameter(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(zoo.save("gpt_oss", tmp_path))
    module = checkpoint.layers[0].module
    first, second = checkpoint.bare_expert(module), checkpoint.bare_expert(module)
    first.to(torch.float16)
    assert {parameter.dtype for parameter in second.parameters()} == {torch.float32}
    checkpoint.load_expert(first, module, 0)
    assert all(parameter.is_meta for parameter in second.parameters())
