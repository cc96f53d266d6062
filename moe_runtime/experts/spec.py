"""One expert of one layer, as plain values, and the cheap check that it can be built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from moe_runtime.config.mistakes import describe_mistake
from moe_runtime.config.strict import MAX_ITEM_ELEMENTS
from moe_runtime.errors import ConfigError, PlugInError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.protocol import Expert, ExpertContract
from moe_runtime.experts.registry import built_in_kinds, resolve_kind
from moe_runtime.experts.suggestions import did_you_mean
from moe_runtime.experts.view import resolve_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails
    from torch import nn

    from moe_runtime.config.experts import ViewConfig
    from moe_runtime.config.models import DTypeName
    from moe_runtime.config.strict import StrictModel


@dataclass(frozen=True)
class ExpertSpec:
    """Everything that a host on any node needs to build one expert; plain values, so that it pickles.

    Attributes:
        layer: Name of the layer.
        expert_id: Place in the layer, which is its row of the gate.
        name: Unique in the layer.
        kind: A built-in kind or one of a plug-in.
        item_shape: Shape of one token of the layer.
        view: The part of the token that the expert sees.
        options: Options of the kind, not yet validated.
        dtype: Of the layer.
        weights: Absolute path or address of a safetensors file; None initialises from ``seed``.
        seed: The runtime's; each expert draws its own stream from it, by layer and name.
        exact: Whether every call is a matrix product of its own.
        wire_dtype: Of the rows that arrive and leave; the layer's when None.
    """

    layer: str
    expert_id: int
    name: str
    kind: str
    item_shape: tuple[int, ...]
    view: ViewConfig | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: DTypeName = "float32"
    weights: str | None = None
    seed: int = 0
    exact: bool = False
    wire_dtype: DTypeName | None = None

    @property
    def where(self) -> str:
        """How messages name this expert."""
        return f"layers.{self.layer}.experts[{self.name}]"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of the rows that arrive and leave, as torch has it."""
        dtype: torch.dtype = getattr(torch, self.wire_dtype or self.dtype)
        return dtype


def expert_contract(spec: ExpertSpec) -> ExpertContract:
    """What the expert will take and give, found without allocating its parameters.

    Checks the kind, its options, the view and the shapes. Weights are checked by ``build_expert``.

    Raises:
        ConfigError: If one of them does not work; the message begins with the expert's place.
        PlugInError: If the kind's plug-in is broken.
    """
    with torch.device("meta"):
        contract = contract_of(build_module(spec), spec)
    if math.prod(contract.out_shape) > MAX_ITEM_ELEMENTS:
        raise ConfigError(
            f"{spec.where}: expected output rows of at most {MAX_ITEM_ELEMENTS} elements, "
            f"found the shape {list(contract.out_shape)}"
        )
    return contract


def build_module(spec: ExpertSpec) -> nn.Module:
    """The bare module, on torch's current default device, with parameters from its global generator.

    Raises:
        ConfigError: If the kind, its options, the view or the shape does not work.
        PlugInError: If the kind's plug-in is broken, or ends the process.
    """
    try:
        kind = resolve_kind(spec.kind)
        view = resolve_view(spec.item_shape, spec.view)
    except PlugInError as exc:
        raise PlugInError(f"{spec.where}: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"{spec.where}: {exc}") from exc
    options = _parse_options(spec, kind.options)
    try:
        return kind.build(view.shape, options)
    except ConfigError as exc:
        raise type(exc)(f"{spec.where}: {exc}") from exc
    except (Exception, SystemExit) as exc:
        raise raised_by_kind(f"building kind {spec.kind!r} for rows of shape {list(view.shape)}", spec, exc) from exc


def raised_by_kind(doing: str, spec: ExpertSpec, error: BaseException) -> ConfigError:
    """The error that stands for one that a kind's code raised: ``PlugInError`` if the kind is a plug-in's.

    A built-in kind raises only where the configuration asks for what torch cannot do.
    """
    error_class = ConfigError if spec.kind in built_in_kinds() else PlugInError
    return error_class(f"{spec.where}: {doing} raised {in_one_line(error)}")


def contract_of(module: nn.Module, spec: ExpertSpec) -> ExpertContract:
    """The contract that a built module declares.

    Raises:
        PlugInError: If it declares none, or one for rows of another shape than it was built for.
    """
    if not isinstance(module, Expert) or not isinstance(module.contract, ExpertContract):
        raise PlugInError(
            f"{spec.where}: expected the module of kind {spec.kind!r} to have a `contract`, an ExpertContract; "
            f"found a {type(module).__name__} without one"
        )
    in_shape = resolve_view(spec.item_shape, spec.view).shape
    if tuple(module.contract.in_shape) != in_shape:
        raise PlugInError(
            f"{spec.where}: expected kind {spec.kind!r} to declare the input shape {list(in_shape)} that it was "
            f"built for, found {list(module.contract.in_shape)}"
        )
    return module.contract


def _parse_options(spec: ExpertSpec, model: type[StrictModel]) -> StrictModel:
    try:
        return model.model_validate(dict(spec.options))
    except ValidationError as exc:
        raise ConfigError("\n".join(_option_mistake(spec, model, error) for error in exc.errors())) from exc
    except (Exception, SystemExit) as exc:
        raise raised_by_kind(f"checking the options of kind {spec.kind!r}", spec, exc) from exc


def _option_mistake(spec: ExpertSpec, model: type[StrictModel], error: ErrorDetails) -> str:
    path = ".".join([spec.where, "options", *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(str(error["loc"][-1]), model.model_fields)
        return f"{path}: kind {spec.kind!r} has no such option; {hint}"
    if error["type"] == "missing":
        return f"{path}: kind {spec.kind!r} needs this option, found none"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    return f"{path}: {describe_mistake(error, model=model)}"
