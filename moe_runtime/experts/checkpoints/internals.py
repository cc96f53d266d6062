"""The only module that uses what transformers does not promise to keep: an upgrade of it is tried and mended here.

Importing it imports transformers; that takes seconds, so a module that is always imported must not import this one.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.experts.checkpoints.requirement import check_transformers

check_transformers()

# Below the check, which explains what a failing import would not.
import transformers  # noqa: E402
from transformers import core_model_loading as loading  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: E402
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation  # noqa: E402
from transformers.integrations.mxfp4 import Mxfp4Dequantize  # noqa: E402
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


_ERNIE = loading.ErnieFuseAndSplitTextVisionExperts
#: How the keys end that hold scales of other tensors.
_SCALES = ("_scale_inv", "activation_scale", "_scales")
#: Quantisations that are undone when an expert is loaded.
_DEQUANTIZED = ("fp8", "mxfp4")


def model_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without any memory for its parameters, in eval mode."""
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class._from_config(deepcopy(config), dtype=dtype)
        model.eval()
    return model


@contextmanager
def untied(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Within it, transformers does not look for these parameters in order to tie them to each other.

    It changes classes for the whole process, and restores them when it is left.

    Args:
        model: Built whole; it is not changed.
        names: Of parameters that models of its class come up without.
    """
    with ExitStack() as restoring:
        for path, part in model.named_modules():
            ties = getattr(part, "_tied_weights_keys", None)
            if not isinstance(part, transformers.PreTrainedModel) or not ties:
                continue
            prefix = f"{path}." if path else ""
            gone = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            kept = {target: source for target, source in ties.items() if not _is_about(target, part, only=gone)}
            if len(kept) < len(ties):
                restoring.callback(setattr, type(part), "_tied_weights_keys", ties)
                setattr(type(part), "_tied_weights_keys", kept)  # noqa: B010  the class is not known, to mypy
        yield


def _is_about(pattern: str, model: nn.Module, *, only: Collection[str]) -> bool:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {name for name, _ in tensors if re.match(pattern, name)}
    return bool(found) and found <= set(only)


@contextmanager
def ignoring_keys(model_class: type[PreTrainedModel], patterns: Collection[str]) -> Iterator[None]:
    """Within it, models of a class load without a word where a checkpoint has keys like these, and they have not."""
    own = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = {*(own or ()), *patterns}
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = own


def mark_initialized(holder: nn.Module | Tensor) -> None:
    """Have transformers leave a module's own parameters, or a tensor, as they are when it initialises a model."""
    holder._is_hf_initialized = True  # type: ignore[union-attr]


def wrap_from_pretrained(load: Callable[[Callable[..., Any], type[PreTrainedModel], Any, dict[str, Any]], Any]) -> None:
    """Have another function load every model from now on: it gets what did so far, the class, the path and options."""
    original = transformers.PreTrainedModel.__dict__["from_pretrained"].__func__

    @wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], path: Any, *args: Any, **options: Any) -> Any:
        return load(lambda path, **options: original(cls, path, *args, **options), cls, path, options)

    setattr(transformers.PreTrainedModel, original.__name__, classmethod(from_pretrained))


def register_experts(name: str, forward: Callable[..., Any]) -> None:
    """Make an implementation of experts known by a name."""
    ExpertsInterface.register(name, forward)


def experts_implementation(config: object) -> str | None:
    """Name of the implementation of experts that a configuration asks for, if it is one and does."""
    return getattr(config, "_experts_implementation", None)


def choose_experts(config: PretrainedConfig, name: str) -> None:
    """Have the modules that share a configuration run their experts by the implementation of that name."""
    config._experts_implementation = name


def apply_gate(experts: Any, inner: Tensor) -> Tensor:
    """What experts of a decorated class make of the products with gate and up projection, ``(N, 2I)`` to ``(N, I)``."""
    gated: Tensor = experts._apply_gate(inner)
    return gated


def natural_order(key: str) -> Any:
    """Sorts checkpoint keys by their numbers rather than their digits, as transformers collects them."""
    return loading.dot_natural_key(key)


def is_decorated(module_class: type[nn.Module]) -> bool:
    """Whether a class of experts was made by ``@use_experts_implementation``."""
    # Its name and module are those of the forward that it wraps, and ``_apply_gate`` may be a class's own.
    made_in = getattr(module_class.forward, "__globals__", {}).get("__name__")
    return hasattr(module_class, "_apply_gate") and made_in == use_experts_implementation.__module__


class KeyMap:
    """Where transformers puts each tensor of a checkpoint in a model, and by which conversion.

    Args:
        model: The whole model, on the meta device.

    Attributes:
        tied: By the name of a parameter that is another one's, the name of that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.tied: Mapping[str, str] = dict(model.all_tied_weights_keys)
        quantizer = _dequantizer(model.config)
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
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

    def _renamed(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        target, pattern = loading.rename_source_key(key, renamings, converters, self._prefix, self._parameters)
        return str(target), pattern


class Conversion:
    """How transformers makes one parameter of several tensors, or of one that is laid out otherwise.

    Attributes:
        operations: Names of the operations, in order.
        weights: Patterns of the keys that hold the parameter's parts, in the order of those; scales are not among them.
        num_targets: How many parameters it makes of the same tensors.
        concat_dim: The dimension of the parameter along which the parts of one expert lie side by side.
    """

    def __init__(self, converter: Any, config: PretrainedConfig) -> None:
        self._converter = converter
        self._config = config
        self._targets: tuple[str, ...] = tuple(converter.target_patterns)
        self.operations = tuple(type(operation).__name__ for operation in converter.operations)
        self.weights = tuple(name for name in converter.source_patterns if not name.endswith(_SCALES))
        self.num_targets = len(self._targets)
        last = converter.operations[-1]
        self.concat_dim: int = last.concat_dim if isinstance(last, _ERNIE) else getattr(last, "dim", None) or 1

    @property
    def merges_experts(self) -> bool:
        """Whether each expert has tensors of its own, to be stacked, and laid side by side where it has several."""
        stacking = self._converter.operations[1 if self.operations[0] == "Fp8Dequantize" else 0 :]
        if len(stacking) == 1 and isinstance(stacking[0], _ERNIE):
            return stacking[0].stack_dim == 0 and self.concat_dim > 0
        merging = isinstance(stacking[0], loading.MergeModulelist) and stacking[0].dim == 0 and self.num_targets == 1
        joined = [isinstance(each, loading.Concatenate) and each.dim > 0 for each in stacking[1:]]
        return merging and joined in ([], [True])

    @property
    def keeps_rows(self) -> bool:
        """Whether row i of the parameter's dimension 0 is made of row i of each tensor, and so can be made alone."""
        return self.num_targets == 1 and all(_keeps_rows(operation) for operation in self._converter.operations)

    def all_targets(self, first: str) -> tuple[str, ...]:
        """The names of all parameters that it makes, given the name of the first."""
        return tuple(first.replace(self._targets[0], target) for target in self._targets)

    def target_index(self, name: str) -> int:
        """Which of the parameters that it makes has that name."""
        return (
            next(index for index, target in enumerate(self._targets) if target in name) if self.num_targets > 1 else 0
        )

    def scale_of(self, pattern: str) -> str | None:
        """The pattern of the scales of a part that is quantised in blocks; None if its conversion knows of none."""
        scale = f"{pattern}_scale_inv"
        return scale if scale in self._converter.source_patterns else None

    def dequantized(self, name: str, weight: Tensor, scale: Tensor, module: nn.Module) -> Tensor:
        """A part that is quantised in blocks, in the dtype of the parameter ``name`` of a module."""
        operation = self._converter.operations[0]
        made = operation.convert({"": [weight], "_scale_inv": [scale]}, full_layer_name=name, model=module)
        dequantized: Tensor = made[""][0]
        return dequantized

    def __call__(self, name: str, tensors: Mapping[str, Sequence[Tensor]], module: nn.Module) -> Tensor:
        """Rows of the parameter, made of the same rows of each tensor.

        Args:
            name: Of the parameter in ``module``, which has the shape and dtype that are wanted.
            tensors: One by source pattern.
            module: Holds the parameter; it is not changed.
        """
        converter = deepcopy(self._converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(name, pattern, pattern, tensor)
        (made,) = converter.convert(name, model=module, config=self._config).values()
        parameter: Tensor = made[0] if isinstance(made, list) else made
        return parameter


def _keeps_rows(operation: loading.ConversionOps) -> bool:
    if isinstance(operation, loading.Transpose):
        return 0 not in (operation.dim0, operation.dim1)
    if isinstance(operation, loading.Concatenate | loading.Interleave):
        return operation.dim != 0
    return isinstance(operation, Fp8Dequantize | Mxfp4Dequantize)


def _dequantizer(config: PretrainedConfig) -> Any:
    """What makes plain tensors of a quantised checkpoint's; None if it is not quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method not in _DEQUANTIZED:
        raise UnsupportedModelError(
            f"expected plain weights or a quantisation that is undone while loading ({', '.join(_DEQUANTIZED)}), "
            f"found {method!r}; save a checkpoint that is dequantised"
        )
    quantizer = AutoHfQuantizer.from_config(deepcopy(settings), pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


class _DequantizingFp8(FineGrainedFP8HfQuantizer):
    """Asks for neither a GPU nor accelerate where it only dequantises, which takes none of them."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        if not self.quantization_config.dequantize:
            own.validate_environment(*args, **kwargs)


@contextmanager
def dequantizing_anywhere() -> Iterator[None]:
    """Within it, checkpoints in FP8 that are dequantised while loading load where accelerate is not installed, too."""
    own = AUTO_QUANTIZER_MAPPING["fp8"]
    AUTO_QUANTIZER_MAPPING["fp8"] = _DequantizingFp8
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["fp8"] = own
