"""A dense checkpoint as upcycling reads it: its configuration, and its tensors one at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from moe_runtime.errors import UnsupportedModelError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

#: The dense families that have a mixture's layout, by the ``model_type`` of their configuration.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}

#: Keys by which configurations of mixtures say how many experts they have.
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_count")

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


class DenseCheckpoint(Protocol):
    """A dense causal language model on disk. Opening it reads no weights; it is for one thread."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its weights."""
        ...

    @property
    def config(self) -> PreTrainedConfig:
        """Its configuration, as transformers has it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What ``auto`` means: the checkpoint's own, float32 where it is quantised."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor it holds, by the names of transformers."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype that it is stored in; float32 where it is quantised.

        Raises:
            WeightsError: If it cannot be read.
        """
        ...

    def save_companions(self, folder: Path) -> None:
        """Write what belongs to the model beside its weights: tokenizer, chat template, generation config, licence."""
        ...


def check_config_text(path: Path, text: str) -> None:
    """Refuse the text of a ``config.json`` whose model cannot be upcycled.

    Raises:
        UnsupportedModelError: If it is a mixture already, or of a family that cannot be upcycled.
        WeightsError: If the text is no configuration.
    """
    try:
        fields = json.loads(text)
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError) as exc:
        raise WeightsError(f"{path}: expected a configuration with a model_type, found: {exc!r}") from exc
    check_family(path.parent, model_type, fields)


def check_family(path: Path, model_type: str, fields: Mapping[str, Any]) -> None:
    """Refuse mixtures, and dense families without a mixture's layout.

    Raises:
        UnsupportedModelError: Names the families that can be upcycled.
    """
    expected = f"expected a dense model of one of {', '.join(FAMILIES.values())}"
    for key in _NUM_EXPERTS_KEYS:
        if isinstance(num := fields.get(key), int) and num > 0:
            raise UnsupportedModelError(f"{path}: {expected}; found a mixture already: {model_type} with {key} {num}")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"{path}: {expected}; found model_type {model_type!r}")


def read_config(path: Path, read: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """What transformers makes of a configuration.

    Raises:
        WeightsError: If transformers refuses it; says why.
    """
    try:
        return read()
    except Exception as exc:  # its validators raise errors of many classes
        raise WeightsError(f"{path}: expected a configuration that transformers can read; it says: {exc}") from exc


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the model that a configuration describes, tied ones included."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_tensors(checkpoint: DenseCheckpoint) -> None:
    """Compare the checkpoint's tensors with those of the model that its configuration describes.

    Raises:
        WeightsError: If one is missing, unknown to the model, or of another shape.
    """
    expected = tensor_shapes(checkpoint.config)
    optional = {LM_HEAD} if checkpoint.config.tie_word_embeddings else set()
    for name, shape in expected.items():
        if (found := checkpoint.shapes.get(name)) is None and name not in optional:
            raise WeightsError(f"{checkpoint.path}: expected a tensor {name} {shape}, found none")
        if found is not None and found != shape:
            raise WeightsError(f"{checkpoint.path}: {name}: expected shape {shape} by its config, found {found}")
    if unknown := sorted(checkpoint.shapes.keys() - expected):
        raise WeightsError(
            f"{checkpoint.path}: expected only the tensors of a {FAMILIES[checkpoint.config.model_type]} model; "
            f"found {len(unknown)} more: {', '.join(unknown[:3])}"
        )
