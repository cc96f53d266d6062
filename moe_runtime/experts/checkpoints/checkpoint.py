"""A checkpoint folder of transformers: which experts it holds, and each of them as a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.experts.checkpoints.families import Family, expert_modules, twin_on_meta
from moe_runtime.experts.checkpoints.filling import Destination, fill
from moe_runtime.experts.checkpoints.folder import check_folder, file_of_each_key, first_dtype, stamp, version_of
from moe_runtime.experts.checkpoints.internals import model_on_meta
from moe_runtime.experts.checkpoints.plan import ParameterPlan, plan_parameters
from moe_runtime.experts.checkpoints.reader import ShardReader
from moe_runtime.experts.weights_memory import WEIGHTS_MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ExpertLayer:
    """One module of the model that holds experts.

    Attributes:
        module: Its path in the model, ``model.layers.0.mlp.experts``.
        num_experts: How many it holds.
        hidden_size: Width of the rows that an expert takes and gives.
    """

    module: str
    num_experts: int
    hidden_size: int


class Checkpoint:
    """A checkpoint whose experts can be had one by one; get it from ``open_checkpoint``.

    It reads the configuration and the names of the tensors; of the tensors themselves only those of an expert that is
    asked for. Safe to use from several threads.

    Args:
        folder: Of the checkpoint.
        architecture: Class of transformers; the configuration's first architecture when None.
    """

    def __init__(self, folder: Path, architecture: str | None = None) -> None:
        check_folder(folder)
        self.folder = folder
        self.config = _configuration(folder)
        self.model_class = _model_class(self.config, architecture)
        self._lock = RLock()
        self._bare: dict[str, nn.Module] = {}
        #: Stands for the content of its files, as they were when it was opened; see ``folder.version_of``.
        self.version = version_of(folder)
        #: Bytes of tensors that were read here, and the names of those tensors, in order.
        self.bytes_read = 0
        self.keys_read: list[str] = []

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which transformers loads it unless told otherwise: that of its configuration, else of its tensors."""
        named = self.config.dtype
        return named if isinstance(named, torch.dtype) else first_dtype(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole model on the meta device: shapes and modules, without memory for a parameter."""
        return model_on_meta(self.model_class, self.config, self.dtype)

    @cached_property
    def families(self) -> Mapping[str, Family]:
        """The family of each module that holds experts, by its path.

        Raises:
            UnsupportedModelError: If there is none, or one that is not supported.
        """
        return expert_modules(self.model)

    @property
    def expert_classes(self) -> frozenset[type[nn.Module]]:
        """The classes of the modules that hold experts."""
        return frozenset(type(self.model.get_submodule(name)) for name in self.families)

    @cached_property
    def layers(self) -> tuple[ExpertLayer, ...]:
        """The modules that hold experts, in the order of the model."""
        found = ((name, family, self.model.get_submodule(name)) for name, family in self.families.items())
        return tuple(
            ExpertLayer(name, family.num_experts(module), family.hidden_size(module)) for name, family, module in found
        )

    @cached_property
    def _layer_by_module(self) -> Mapping[str, ExpertLayer]:
        return {layer.module: layer for layer in self.layers}

    def layer(self, module: str) -> ExpertLayer:
        """The layer of that path.

        Raises:
            UnsupportedModelError: If no module of that path holds experts.
        """
        found = self._layer_by_module.get(module)
        if found is None:
            raise UnsupportedModelError(
                f"{self.folder}: expected a module that holds experts, one of {self.layers[0].module} to "
                f"{self.layers[-1].module}, found {module!r}"
            )
        return found

    def bare_expert(self, module: str) -> nn.Module:
        """One expert's module with its parameters on the meta device; ``load_expert`` fills it.

        Raises:
            UnsupportedModelError: If no module of that path holds experts.
        """
        self.layer(module)
        with self._lock:
            if module not in self._bare:
                self._bare[module] = self._single(module)
        return twin_on_meta(self._bare[module])

    def _single(self, module: str) -> nn.Module:
        single = self.families[module].single(self.model.get_submodule(module))
        for name, _ in single.named_buffers():
            # Nothing says where its values come from.
            raise UnsupportedModelError(f"{module}: expected experts with parameters alone, found the buffer {name!r}")
        return single.eval().requires_grad_(False)

    def expert(self, module: str, index: int, *, dtype: torch.dtype | None = None) -> nn.Module:
        """One expert, with its parameters read from the checkpoint, on the CPU.

        Args:
            module: Path of the module that holds it.
            index: Its place there.
            dtype: Of its parameters; the checkpoint's when None.

        Raises:
            UnsupportedModelError: If there is no such expert.
            WeightsError: If a tensor of it is missing, broken or of another shape.
        """
        bare = self.bare_expert(module)
        if dtype is not None:
            bare.to(dtype)
        self.load_expert(bare, module, index)
        return bare

    def load_expert(self, bare: nn.Module, module: str, index: int) -> None:
        """Read the parameters of one expert into a ``bare_expert``, in the dtypes that it has, on the CPU.

        Raises:
            WeightsError: If a tensor of it is missing, broken or of another shape.
        """
        owned = self.families[module].parameters(self.model.get_submodule(module), index)
        with ShardReader(self.folder) as reader:
            for name, rows in owned.items():
                owner, _, parameter = name.rpartition(".")
                holder = bare.get_submodule(owner)
                like = holder.get_parameter(parameter)
                tensor = WEIGHTS_MEMORY.empty(like.shape, like.dtype)
                plan = self.plan[f"{module}.{rows.parameter}"]
                fill(Destination(tensor, holder, parameter), plan, reader, rows=rows.rows)
                holder._parameters[parameter] = torch.nn.Parameter(tensor, requires_grad=False)
        with self._lock:
            self.bytes_read += reader.bytes_read
            self.keys_read += reader.keys_read

    @cached_property
    def plan(self) -> Mapping[str, ParameterPlan]:
        """What each parameter of the experts is made of, by its name in the model."""
        wanted = {
            f"{name}.{rows.parameter}"
            for name, family in self.families.items()
            for module in [self.model.get_submodule(name)]
            for expert in range(family.num_experts(module))
            for rows in family.parameters(module, expert).values()
        }
        return plan_parameters(file_of_each_key(self.folder), self.model, wanted)


def open_checkpoint(path: str | Path, *, architecture: str | None = None) -> Checkpoint:
    """The checkpoint in a folder; the same object for as long as its files are the same.

    Args:
        path: Its folder, with ``config.json`` and safetensors files.
        architecture: Class of transformers whose module paths are meant; the configuration's first when None.

    Raises:
        WeightsError: If it is no such folder, or its configuration is broken.
        UnsupportedModelError: If it is of a model that transformers does not have.
    """
    folder = Path(path).expanduser().absolute()
    return _opened(folder, architecture, stamp(folder))


@lru_cache(maxsize=8)
def _opened(folder: Path, architecture: str | None, _: object) -> Checkpoint:
    return Checkpoint(folder, architecture)


def _configuration(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except OSError as exc:
        raise WeightsError(f"{folder}: expected a config.json of transformers, found a broken one: {exc}") from exc
    except (ValueError, KeyError) as exc:
        raise UnsupportedModelError(f"{folder}: expected a configuration that transformers knows: {exc}") from exc
    return config


def _model_class(config: PretrainedConfig, architecture: str | None) -> type[PreTrainedModel]:
    names = [architecture] if architecture is not None else list(config.architectures or ())
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if not names and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return cast("type[PreTrainedModel]", causal)
    raise UnsupportedModelError(
        f"expected a model class of transformers for a configuration of type {config.model_type!r}, "
        f"found {names[0] if names else 'none'}"
    )
