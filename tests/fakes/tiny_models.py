"""Random models of transformers that fit anywhere, saved as checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral(**changes: Any) -> transformers.PreTrainedModel:
    """4 experts, 2 of them per token, in 2 layers."""
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    return _random(transformers.MixtralForCausalLM, config)


def qwen3_moe(**changes: Any) -> transformers.PreTrainedModel:
    """8 experts, 3 of them per token."""
    sizes = {**SIZES, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
    return _random(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**{**sizes, **changes}))


def gpt_oss(**changes: Any) -> transformers.PreTrainedModel:
    """4 experts with biases and matrices that are interleaved, 2 of them per token."""
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16}
    return _random(transformers.GptOssForCausalLM, transformers.GptOssConfig(**{**sizes, **changes}))


def switch_transformers(**changes: Any) -> transformers.PreTrainedModel:
    """An encoder and a decoder with 4 experts each, one of them per token."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, **changes,
    )  # fmt: skip
    return _random(transformers.SwitchTransformersForConditionalGeneration, config)


MODELS: Mapping[str, Callable[..., transformers.PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}


def saved(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The folder of a checkpoint of one of ``MODELS``; made in the given one."""
    path = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
    MODELS[name](**changes).to(dtype).save_pretrained(path)
    return path


def prompt(*, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids and a mask of which the first row is padded on the left, as ``generate`` takes them."""
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _random(model_class: type[transformers.PreTrainedModel], config: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        # Far from the small values of an initialisation, at which every token gets much the same of every expert.
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model
