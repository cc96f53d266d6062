"""The dense model itself: what its mixture is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from moe_runtime.integrations.transformers.upcycling.checkpoint import open_dense

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

_MODELS: Mapping[str, Any] = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}


def load_dense(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model of a checkpoint, in eval mode and without gradients.

    Unlike transformers, this reads GGUF files without accelerate.

    Args:
        path: As for ``open_dense``.
        dtype: Of its weights.

    Raises:
        UnsupportedModelError: As ``open_dense``.
        WeightsError: As ``open_dense``.
    """
    dense = open_dense(path)
    weights = {name: dense.read(name) for name in dense.shapes}
    model = _MODELS[dense.config.model_type].from_pretrained(None, config=dense.config, state_dict=weights, dtype=dtype)
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded
