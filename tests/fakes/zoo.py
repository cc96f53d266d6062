"""A tiny random model of every family with experts in transformers: the canary for what an upgrade of it changes."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_runtime.experts.checkpoints.families import DecoratedFamily, expert_modules
from moe_runtime.experts.checkpoints.internals import choose_experts, model_on_meta

MODELS = Path(transformers.__file__).parent / "models"

#: What every configuration gets, of the fields that it has.
SIZES: Mapping[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "max_position_embeddings": 128, "sliding_window": 16,
    "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "image_size": 16, "num_position_embeddings": 16,
}  # fmt: skip
_VISION_MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
_SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 48, "downsample_channels": [16, 32],
}  # fmt: skip
_AUDIO = {
    "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
    "max_source_positions": 32, "n_window": 8, "output_dim": 32, "n_window_infer": 8, "conv_chunksize": 8,
    "downsample_hidden_size": 16,
}  # fmt: skip
_DELTA_NET = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_RELATIVE = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 32,
}  # fmt: skip
_INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}


def _mrope(*section: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), "partial_rotary_factor": 1.0}
    return {"rope_parameters": rope}


#: What a family needs beside ``SIZES``; those of its text model where the whole is built are in ``text_config``.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": _LINEAR_THEN_FULL,
    "beam": _DENSE_THEN_SPARSE,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 3},
    },
    "deepseek_ocr2": {
        "text_config": {"num_key_value_heads": 4, **_DENSE_THEN_SPARSE},
        "vision_config": {"sam_config": _SAM},
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v4": {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "o_groups": 2, "o_lora_rank": 16},
    "diffusion_gemma": {
        "text_config": {"global_head_dim": 8, **_SLIDING_THEN_FULL},
        "vision_config": {
            "model_type": "gemma4_vision", **_VISION_MODEL,
            "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16,
        },
        "canvas_length": 8,
    },
    "dots3_note": _INDEXER,
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [128, 64], **_mrope(1, 1, 2)},
        "vision_config": _VISION,
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "global_head_dim": 8, "enable_moe_block": True, "vocab_size_per_layer_input": 160,
        "hidden_size_per_layer_input": 8, **_SLIDING_THEN_FULL,
    },
    "glm4v_moe": {"text_config": {**_mrope(1, 1, 2)}, "vision_config": _VISION},
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"], **_DENSE_THEN_SPARSE,
            "linear_head_dim": 8, "linear_num_heads": 4, **_INDEXER, "index_kpool": 2, "hc_mult": 2,
        },
        "vision_config": {**_VISION, "projection_intermediate_size": 48},
    },
    "glm_moe_dsa": _INDEXER,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_chunk_size": 8,
        "shared_intermediate_size": 24,
    },
    "inkling": _RELATIVE,
    "inkling2": _RELATIVE,
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "jetmoe": {"num_experts_per_tok": 3, "num_key_value_heads": 2, "kv_channels": 8},
    "kimi_linear": {**_LINEAR_THEN_FULL, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"intermediate_size_mlp": 48, "moe_layers": [0, 1], "num_experts_per_tok": 2},
    "longcat_flash": {
        "num_layers": 2, "num_key_value_heads": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 64,
        "zero_expert_num": 2, "moe_topk": 3, "qk_head_dim": None,
    },
    "mistral_large4": {
        "text_config": _INDEXER,
        "vision_config": {"model_type": "pixtral", **_VISION_MODEL, "head_dim": 16},
    },
    "muse_spark": {
        "text_config": {"moe_hidden_size": 64},
        "vision_config": {**_VISION_MODEL, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
        "audio_config": {
            "patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1, "out_hidden_size": 32,
        },
        "out_hidden_size": 32, "projector_hidden_size": 32,
    },
    "nemotron_h": {
        "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 64,
    },
    "qwen3_5_moe": {**_LINEAR_THEN_FULL, **_DELTA_NET},
    "qwen3_next": {**_LINEAR_THEN_FULL, **_DELTA_NET},
    "qwen3_omni_moe": {
        "text_config": {**_mrope(2, 1, 1)},
        "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
        "audio_config": _AUDIO,
    },
    "qwen3_vl_moe": {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"], **_DELTA_NET, "hc_count": 2, "hc_lowrank": 4,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {
        "text_config": {
            **_DENSE_THEN_SPARSE, "num_experts_per_tok": 3, "share_expert_dim": 24, "swiglu_limits": [0.0, 0.05],
        },
        "vision_config": {**_VISION_MODEL, "max_position_embeddings": 16, "mlp_ratio": 1.5},
    },
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 2,
        "decoder_start_token_id": 0,
    },
    "unlimited_ocr": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"sam_config": _SAM, "encoder_config": {"image_size": 64, "patch_size": 16}},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip

#: The head, where it is not the family's only ``...ForCausalLM``, else its only ``...ForConditionalGeneration``.
HEADS: Mapping[str, str] = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

#: Families without the decorator whose experts an adapter takes apart.
ADAPTED = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers")

#: Families with the decorator of which no tiny model can be built, and why.
UNBUILDABLE: Mapping[str, str] = {}


@cache
def decorated() -> tuple[str, ...]:
    """The folders of transformers whose models' experts are decorated."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return tuple(file.parent.name for file in files if "\n@use_experts_implementation" in file.read_text())


def families() -> tuple[str, ...]:
    """Every family with a tiny model."""
    return (*(name for name in decorated() if name not in UNBUILDABLE), *ADAPTED)


def tiny(family: str, **changes: Any) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """A configuration of a few ten thousand parameters, and the class of the model."""
    model_class = _head(family)
    return shrunk(model_class.config_class, {**CHANGES.get(family, {}), **changes}), model_class


def bare(family: str) -> PreTrainedModel:
    """The family's model on the meta device."""
    config, model_class = tiny(family)
    return model_on_meta(model_class, config, torch.float32)


def built(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The family's model with random parameters, of a size that makes its experts matter, always the same."""
    config, model_class = tiny(family, **changes)
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            if tensor.ndim >= 2 and "embed" not in name and isinstance(tensor, torch.nn.Parameter):
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
            elif name.rpartition(".")[2] in {"gate_up_proj_bias", "down_proj_bias", "e_score_correction_bias"}:
                tensor.normal_(std=0.1, generator=generator)
    return model.to(dtype)


def save(family: str, folder: Path, *, shard_size: str = "1GB", **how: Any) -> Path:
    """Write the family's model, ``built`` in some way, as a checkpoint, and return its folder."""
    built(family, **how).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reference(family: str, folder: Path) -> PreTrainedModel:
    """The checkpoint's model in one process, with ``grouped_mm`` where the family has a choice.

    Two things in which two equal models may differ in the last bits are made as they are with experts elsewhere. It is
    frozen: torch takes other products for parameters that require a gradient. And its experts' matrices are in memory
    that torch allocated: those that transformers does not convert lie where they lie in the file, at any multiple of 8
    bytes, and the product of a matrix with one row depends on that.
    """
    _, model_class = tiny(family)
    model = model_class.from_pretrained(folder).requires_grad_(False)
    for path, holder in expert_modules(model).items():
        module = model.get_submodule(path)
        if isinstance(holder, DecoratedFamily):
            choose_experts(module.config, "grouped_mm")
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    return model


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sequences of nine tokens, as the model's forward takes them."""
    token_ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    if model.config.is_encoder_decoder:
        return {"input_ids": token_ids, "decoder_input_ids": token_ids.flip(1)}
    return {"input_ids": token_ids}


def logits(model: PreTrainedModel) -> Tensor:
    """What the model says to ``inputs``."""
    torch.manual_seed(4)  # diffusion_gemma draws the canvas that it starts from
    with torch.no_grad():
        found: Tensor = model(**inputs(model)).logits
    return found


def _head(family: str) -> type[PreTrainedModel]:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in HEADS:
        return getattr(module, HEADS[family])
    for suffix in ("ForCausalLM", "ForConditionalGeneration"):
        found = [name for name in module.__all__ if re.fullmatch(rf"\w+{suffix}", name)]
        if found:
            (name,) = found
            return getattr(module, name)
    raise LookupError(f"{family}: no head for generation; name one in HEADS")


def shrunk(config_class: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration with ``SIZES`` where it has such fields, and with changes; so are those inside of it."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]
    inner = {**getattr(config_class, "sub_configs", {})}
    for name, sub_class in inner.items():
        given = changes.get(name, {})
        if "model_type" not in given and dataclasses.is_dataclass(sub_class):
            values[name] = shrunk(sub_class, given)
        elif given:
            values[name] = dict(given)
    return config_class(**{**values, **{name: value for name, value in changes.items() if name not in inner}})
