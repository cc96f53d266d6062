"""Dense checkpoints in one GGUF file, dequantised tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, dequantize, get_tensor_name_map
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.integrations.transformers.upcycling.dense import check_family, read_config, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
#: Keys below the architecture's name that transformers reads, or that say nothing that the tensors' shapes don't.
_KNOWN_KEYS = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.dimension_count",
    "rope.freq_base", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length",
}  # fmt: skip
#: Keys that change nothing as long as they have this value.
_NEUTRAL_VALUES: Mapping[str, Any] = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_count": 0}
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",  # nosec B105
    "eos_token_id": "eos_token_id",  # nosec B105
    "padding_token_id": "pad_token_id",  # nosec B105
}


@dataclass(frozen=True)
class GgufFile:
    """A dense checkpoint in a GGUF file; see ``DenseCheckpoint``."""

    path: Path
    files: tuple[Path, ...]
    config: PreTrainedConfig
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    _tensors: Mapping[str, Any] = field(repr=False)
    _interleaves_heads: bool
    _has_tokenizer: bool

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32 unless the file has it in a float type that torch has too."""
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as exc:
            raise WeightsError(f"{self.path}: {tensor.name}: cannot be dequantised: {exc}") from exc
        weight = torch.from_numpy(np.array(values))
        if self._interleaves_heads and name.endswith(("q_proj.weight", "k_proj.weight")):
            is_query = name.endswith("q_proj.weight")
            return _halves(weight, self.config.num_attention_heads if is_query else self.config.num_key_value_heads)
        return weight

    def save_companions(self, folder: Path) -> None:
        """Convert the file's tokenizer and chat template, and write its special tokens as generation config."""
        if self._has_tokenizer:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            except (
                Exception
            ) as exc:  # whatever transformers, or a package that it lacks, says of this kind of tokenizer
                raise WeightsError(f"{self.path}: its tokenizer cannot be converted: {exc}") from exc
            tokenizer.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)


def open_gguf(path: Path) -> GgufFile:
    """The dense checkpoint in a GGUF file.

    Raises:
        UnsupportedModelError: If it is of another family, a mixture, or has settings that transformers does not read.
        WeightsError: If the file is no GGUF file, is truncated, or one part of several.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as exc:
        raise WeightsError(f"{path}: expected a whole GGUF file, found: {exc}") from exc
    fields = {
        name: found.contents() for name, found in reader.fields.items() if not name.startswith("tokenizer.ggml.t")
    }
    architecture = str(fields.get("general.architecture"))
    _check_fields(path, architecture, fields)
    config = read_config(path, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    for key, attribute in _TOKEN_IDS.items():
        if (token_id := fields.get(f"tokenizer.ggml.{key}")) is not None:
            setattr(config, attribute, int(token_id))
    tensors = _by_transformers_name(path, reader, architecture, config)
    return GgufFile(
        path,
        (path,),
        config=config,
        dtype=_DTYPES.get(reader.tensors[0].tensor_type, torch.float32),
        shapes={name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()},
        _tensors=tensors,
        _interleaves_heads=architecture == "llama",
        _has_tokenizer="tokenizer.ggml.model" in fields,
    )


def _check_fields(path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
    """Refuse what transformers would drop without a word: it reads some keys, and ignores the rest."""
    own = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    check_family(path, architecture, own)
    if (num_parts := fields.get("split.count", 1)) > 1:
        raise WeightsError(f"{path}: expected a whole model, found one of {num_parts} parts; join them (gguf-split)")
    for name, value in fields.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in _KNOWN_KEYS or (key in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[key]):
            continue
        raise UnsupportedModelError(
            f"{path}: expected settings that transformers reads from GGUF files, found {name} = {value!r}; "
            f"upcycle the model's safetensors instead"
        )


def _by_transformers_name(
    path: Path, reader: GGUFReader, architecture: str, config: PreTrainedConfig
) -> dict[str, Any]:
    """Every tensor of the file, by its name in transformers."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    held = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name in tensor_shapes(config):
        module, _, suffix = name.rpartition(".")
        if (tensor := held.pop(f"{names.get_name(module)}.{suffix}", None)) is not None:
            found[name] = tensor
    if held:
        raise UnsupportedModelError(
            f"{path}: expected only tensors that transformers reads from GGUF files, found "
            f"{', '.join(sorted(held)[:3])}; upcycle the model's safetensors instead"
        )
    return found


def _halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head as transformers rotates them: one half, then the other; the file has them in turns.

    llama.cpp's converter put them in turns (``permute`` in its convert_hf_to_gguf.py).
    """
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
