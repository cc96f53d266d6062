"""Tiny random mixtures of transformers with experts in each layout of checkpoints, and changes to their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

NUM_EXPERTS = 4
_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_NARROW: Mapping[str, Any] = {**_SIZES, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

#: By what is special about its layout: the model's class, and what its configuration needs.
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("Mixtral", {**_SIZES, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_NARROW, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_NARROW,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOss", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "granitemoe": ("GraniteMoe", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": (
        "NemotronH",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "layers_block_type": ["moe", "attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


def save_tiny(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any
) -> Path:
    """Save a random model of ``MODELS`` in a folder, and return it; experts are scaled so that each is told apart."""
    prefix, options = MODELS[name]
    config: PreTrainedConfig = getattr(transformers, f"{prefix}Config")(**{**options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype)
        for parameter_name, parameter in model.named_parameters():
            if "expert" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Rewrite the tensors of a checkpoint that is one file."""
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def quantise_to_fp8(folder: Path, *, block: int = 8) -> None:
    """Quantise the projections of a checkpoint in square blocks, as DeepSeek-V3's is (https://arxiv.org/abs/2412.19437)."""

    def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not key.endswith("proj.weight"):
                found[key] = tensor
                continue
            blocks = tensor.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
            scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            scaled = blocks / scales[:, None, :, None]
            found[key] = scaled.reshape(tensor.shape).to(torch.float8_e4m3fn)
            found[f"{key}_scale_inv"] = scales
        return found

    change_tensors(folder, quantised)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    change_json(folder / "config.json", quantization_config=settings)


def quantise_to_mxfp4(folder: Path) -> None:
    """Replace the experts of a gpt-oss checkpoint by random ones: blocks of 32 4-bit numbers with one exponent each."""
    drawn = torch.Generator().manual_seed(1)

    def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key: tensor for key, tensor in tensors.items() if not key.endswith(("gate_up_proj", "down_proj"))}
        for key in tensors.keys() - found.keys():
            num_experts, in_features, out_features = tensors[key].shape
            grid = (num_experts, out_features, in_features // 32)
            found[f"{key}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8, generator=drawn)
            found[f"{key}_scales"] = torch.randint(120, 126, grid, dtype=torch.uint8, generator=drawn)
        return found

    change_tensors(folder, quantised)
    change_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
