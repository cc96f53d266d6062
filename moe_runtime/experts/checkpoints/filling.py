"""One expert's part of a parameter, read into memory that was allocated for it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_runtime.experts.checkpoints.internals import Conversion
    from moe_runtime.experts.checkpoints.plan import ParameterPlan, Source
    from moe_runtime.experts.checkpoints.reader import ShardReader

#: Bytes of an element below which floating-point numbers are quantised ones, which mean nothing without their scales.
_PLAIN_BYTES = 2


@dataclass(frozen=True, eq=False)
class Destination:
    """Where rows of a model's parameter are read to.

    Attributes:
        tensor: Of the rows' shape, in the dtype that is wanted; it is written to.
        holder: The module that has a parameter of that shape and dtype.
        name: Of that parameter.
    """

    tensor: Tensor
    holder: nn.Module
    name: str


def fill(into: Destination, plan: ParameterPlan, reader: ShardReader, *, rows: slice | None) -> None:
    """Read some rows of a model's parameter.

    Beside the destination it takes no memory where the checkpoint's layout differs from the parameter's by names and
    by merging alone; where tensors are transposed or dequantised, that of one at a time.

    Args:
        into: Where to.
        plan: Of the model's parameter.
        reader: Of the checkpoint.
        rows: Of the parameter's dimension 0; None for all.

    Raises:
        WeightsError: If a tensor is missing, broken, or does not fit.
    """
    conversion = plan.conversion
    if conversion is None:
        ((source,),) = plan.sources.values()
        _copy(reader.read(source, rows), into.tensor, source)
    elif conversion.merges_experts:
        _fill_by_parts(into, plan, conversion, reader, rows=rows)
    else:
        _fill_converted(into, plan, conversion, reader, rows=rows)


def _fill_converted(
    into: Destination, plan: ParameterPlan, conversion: Conversion, reader: ShardReader, *, rows: slice | None
) -> None:
    read = {pattern: [reader.read(source, rows)] for pattern, (source,) in plan.sources.items()}
    first = next(iter(plan.sources.values()))[0]
    try:
        made = conversion(into.name, read, into.holder)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as exc:
        raise WeightsError(f"{first.file}: {first.key}: expected a tensor that can be converted, found {exc}") from exc
    _copy(made, into.tensor, first)


def _fill_by_parts(
    into: Destination, plan: ParameterPlan, conversion: Conversion, reader: ShardReader, *, rows: slice | None
) -> None:
    dim = conversion.concat_dim
    whole = range(len(next(iter(plan.sources.values()))))
    for place, row in enumerate(whole if rows is None else whole[rows]):
        space = into.tensor[place : place + 1]
        filled = 0
        for pattern in conversion.weights:
            source = plan.sources[pattern][row]
            part = reader.read(source)
            scales = plan.sources.get(conversion.scale_of(pattern) or "")
            if scales is not None:
                part = _dequantized(part, reader.read(scales[row]), into, conversion, source)
            part = part.unsqueeze(0)
            size = part.shape[dim] if part.dim() > dim else 0
            _copy(part, space.narrow(dim, filled, min(size, space.shape[dim] - filled)), source)
            filled += size
        if filled != space.shape[dim]:
            raise WeightsError(
                f"{plan.name}: expected parts that fill {space.shape[dim]} places, found {filled} in {source.key}"
            )


def _dequantized(part: Tensor, scale: Tensor, into: Destination, conversion: Conversion, source: Source) -> Tensor:
    try:
        return conversion.dequantized(into.name, part, scale, into.holder)
    except (RuntimeError, ValueError) as exc:
        raise WeightsError(
            f"{source.file}: {source.key}: expected a tensor that its scales {list(scale.shape)} fit, "
            f"found shape {list(part.shape)}: {exc}"
        ) from exc


def _copy(found: Tensor, space: Tensor, source: Source) -> None:
    if found.shape != space.shape:
        raise WeightsError(
            f"{source.file}: {source.key}: expected shape {list(space.shape)} for one expert, found {list(found.shape)}"
        )
    if not found.is_floating_point() or found.element_size() < _PLAIN_BYTES:
        raise WeightsError(
            f"{source.file}: {source.key}: expected floating-point numbers of 16 bits or more, or scales beside them, "
            f"found {found.dtype}"
        )
    with torch.no_grad():
        space.copy_(found)
