"""The only module that uses what transformers does not promise to keep: an upgrade of it is tried and mended here.

Importing it imports transformers; that takes seconds, so a module that is always imported must not import this one.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.experts.checkpoints.requirement import check_transformers

check_transformers()

# Below the check, which explains what a failing import would not.
import transformers  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.core_model_loading import (  # noqa: E402
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights  # noqa: E402
from transformers.quantizers import AutoHfQuantizer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


def model_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without any memory for its parameters, in the configuration's dtype, in eval mode."""
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class._from_config(deepcopy(config))
    return model.eval()


def natural_order(key: str) -> Any:
    """Sorts checkpoint keys by their numbers rather than their digits, as transformers collects them."""
    return dot_natural_key(key)


def is_decorated(module_class: type[nn.Module]) -> bool:
    """Whether a class of experts was made by ``@use_experts_implementation``."""
    return hasattr(module_class, "_apply_gate")


class KeyMap:
    """Where transformers puts each tensor of a checkpoint in a model, and by which conversion.

    Args:
        model: The whole model, on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        quantizer = _dequantizer(model.config)
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._config = model.config
        self._parameters = dict(model.state_dict())

    def target(self, key: str) -> tuple[str, str | None]:
        """The parameter that a checkpoint's key goes to, and the source pattern of its conversion, None for a copy."""
        target, pattern = self._renamed(key, self._renamings, self._converters)
        if target not in self._parameters and key in self._parameters:
            return self._renamed(key, [], [])
        return target, pattern

    def conversion(self, pattern: str) -> Conversion:
        """The conversion that a source pattern belongs to."""
        return Conversion(self._by_pattern[pattern], self._config)

    def _renamed(self, key: str, renamings: Sequence[Any], converters: Sequence[Any]) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, self._prefix, self._parameters)
        return str(target), pattern


class Conversion:
    """How transformers makes one parameter of several tensors, or of one that is laid out otherwise.

    Attributes:
        operations: Names of the operations, in order.
        sources: Patterns of the keys that it collects, in the order of their places in the parameter.
        targets: Patterns of the parameters that it makes.
    """

    def __init__(self, converter: Any, config: PretrainedConfig) -> None:
        self._converter = converter
        self._config = config
        self.operations = tuple(type(operation).__name__ for operation in converter.operations)
        self.sources: tuple[str, ...] = tuple(converter.source_patterns)
        self.targets: tuple[str, ...] = tuple(converter.target_patterns)

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The dimension that each operation works along; None for one that has none."""
        return tuple(getattr(operation, "dim", None) for operation in self._converter.operations)

    def __call__(self, name: str, tensors: Mapping[str, Sequence[Tensor]], module: nn.Module) -> Tensor:
        """The parameter that these tensors make.

        Args:
            name: Of the parameter in ``module``, which has the shape and dtype that are wanted.
            tensors: By source pattern, those of the experts wanted, in order.
            module: Holds the parameter; it is not changed.
        """
        converter = deepcopy(self._converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(name, pattern, pattern, tensor)
        (made,) = converter.convert(name, model=module, config=self._config).values()
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


def _dequantizer(config: PretrainedConfig) -> Any:
    """What makes plain tensors of a quantised checkpoint's; None if it is not quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    quantizer = AutoHfQuantizer.from_config(deepcopy(settings), pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


def model_class_named(name: str) -> type[PreTrainedModel] | None:
    """The class of transformers of that name; None if it has none."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
