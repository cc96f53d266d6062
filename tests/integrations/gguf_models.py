"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from transformers import PreTrainedModel

_ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}


def save(
    model: PreTrainedModel,
    path: Path,
    *,
    fields: Mapping[str, str | int | float] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write the model to a file, with more fields and tensors under the file's own names."""
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    names = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        _add(writer, f"{names.get_name(module)}.{suffix}", _as_in_file(name, weight, model), matrices)
    for name, weight in (tensors or {}).items():
        _add(writer, name, weight, matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, weight: torch.Tensor, matrices: GGMLQuantizationType) -> None:
    values = weight.numpy().astype(np.float32)
    dtype = matrices if weight.ndim == 2 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(values, dtype), raw_dtype=dtype)


def _as_in_file(name: str, weight: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Llama's queries and keys with each head's two halves in turns: ``permute`` of llama.cpp's converter."""
    if model.config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    config = model.config
    num_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
