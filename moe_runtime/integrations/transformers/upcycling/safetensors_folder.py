"""Dense checkpoints as Hugging Face saves them: a folder with ``config.json`` and safetensors files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.integrations.transformers.upcycling.dense import EMBEDDING, check_config_text, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: What belongs to a model beside its weights and is the same for its mixture.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template*", "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
#: A buffer that old Llama checkpoints hold; transformers computes it anew.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class SafetensorsFolder:
    """A dense checkpoint in one or more safetensors files; see ``DenseCheckpoint``."""

    path: Path
    files: tuple[Path, ...]
    config: PreTrainedConfig
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    _readers: Mapping[str, Any] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        tensor: torch.Tensor = self._readers[name].get_tensor(name)
        return tensor

    def save_companions(self, folder: Path) -> None:
        """Copy tokenizer, chat templates, generation config and licence, byte for byte."""
        for pattern in _COMPANIONS:
            for source in self.path.glob(pattern):
                if source.is_dir():
                    shutil.copytree(source, folder / source.name)
                else:
                    shutil.copyfile(source, folder / source.name)


def open_folder(path: Path) -> SafetensorsFolder:
    """The dense checkpoint in a folder.

    Raises:
        UnsupportedModelError: If it is of another family, a mixture, quantised or no causal language model.
        WeightsError: If a file is missing, truncated or not what its index says.
    """
    text = _read_text(path / _CONFIG)
    check_config_text(path / _CONFIG, text)
    config = read_config(path / _CONFIG, lambda: AutoConfig.from_pretrained(path, local_files_only=True))
    _check_config(path, config)
    readers, files = _open_files(path)
    slices = {name: reader.get_slice(name) for name, reader in readers.items()}
    for name, view in slices.items():
        if view.get_dtype() not in _FLOATS:
            raise UnsupportedModelError(
                f"{path}: {name}: expected one of {', '.join(_FLOATS)}, found {view.get_dtype()}"
            )
    shapes = {name: tuple(view.get_shape()) for name, view in slices.items()}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(path, readers)
    return SafetensorsFolder(path, files, config=config, dtype=dtype, shapes=shapes, _readers=readers)


def _check_config(path: Path, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{path}: expected weights that are not quantised, found a quantization_config")
    for name in config.architectures or ():
        if not name.endswith("ForCausalLM"):
            raise UnsupportedModelError(f"{path}: expected a causal language model, found {name}")


def _open_files(path: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The reader of every tensor's file, and the files."""
    if (path / _INDEX).is_file():
        weight_map = _read_weight_map(path / _INDEX)
        files = {name: _open(path / name) for name in sorted(set(weight_map.values()))}
        held = {name: set(reader.keys()) for name, reader in files.items()}
        for key, name in weight_map.items():
            if key not in held[name]:
                raise WeightsError(f"{path / name}: expected the tensor {key}, by {_INDEX}; found none of that name")
        readers = {key: files[name] for key, name in weight_map.items()}
    else:
        files = {_SINGLE: _open(path / _SINGLE)}
        readers = dict.fromkeys(files[_SINGLE].keys(), files[_SINGLE])
    kept = {key: reader for key, reader in readers.items() if not key.endswith(_COMPUTED)}
    return kept, tuple(path / name for name in files)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(_read_text(index))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{index}: expected an index with a weight_map, found: {exc!r}") from exc


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as exc:
        others = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".bin", ".pth", ".pt"))
        hint = f"; {others[0]} is of a format that is not read: save the model as safetensors" if others else ""
        raise WeightsError(f"{path}: expected a safetensors file, found none{hint}") from exc
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{path}: expected a whole safetensors file, found: {exc}") from exc


def _stored_dtype(path: Path, readers: Mapping[str, Any]) -> torch.dtype:
    if EMBEDDING not in readers:
        raise WeightsError(f"{path}: expected a tensor {EMBEDDING}, found none; is it a causal language model?")
    dtype: torch.dtype = readers[EMBEDDING].get_slice(EMBEDDING)[:1].dtype
    return dtype


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise WeightsError(f"{path}: expected a checkpoint's file, found: {exc}") from exc
