"""Tiny dense models with random weights that are large enough for every MLP to show in the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama(**settings: Any) -> PreTrainedModel:
    return _with_large_weights(LlamaForCausalLM(LlamaConfig(**_SIZES | settings)))


def llama3(**settings: Any) -> PreTrainedModel:
    return llama(rope_parameters=_LLAMA3_ROPE, head_dim=16, **settings)


def mistral(**settings: Any) -> PreTrainedModel:
    return _with_large_weights(MistralForCausalLM(MistralConfig(**_SIZES | {"sliding_window": 5} | settings)))


def qwen2(**settings: Any) -> PreTrainedModel:
    return _with_large_weights(Qwen2ForCausalLM(Qwen2Config(**_SIZES | settings)))


def qwen2_with_windows(**settings: Any) -> PreTrainedModel:
    return qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1, **settings)


def save(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, by plain transformers; every tensor of its files is used, and none is missing."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of two sequences of 24 tokens, ``(2, 24, vocab_size)``."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 24), generator=generator)
    with torch.no_grad():
        return model(tokens).logits


def difference(found: PreTrainedModel, expected: PreTrainedModel) -> float:
    """The largest difference of the logits, relative to their scale."""
    reference = logits(expected)
    return float((logits(found) - reference).abs().max() / reference.abs().max())


def _with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
