"""Which tensors of a checkpoint make each parameter of its experts, found from names alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.experts.checkpoints.internals import Conversion, KeyMap, natural_order

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint.

    Attributes:
        key: Its name.
        file: Of the checkpoint's folder.
    """

    key: str
    file: str


@dataclass(frozen=True)
class ParameterPlan:
    """What one parameter of the model is made of.

    Attributes:
        name: Of the parameter in the model.
        sources: By source pattern of the conversion, one tensor for each row of the parameter's dimension 0 where the
            conversion merges experts, else one that has all rows. A parameter that is copied has one source.
        conversion: How they become the parameter; None to copy.
    """

    name: str
    sources: Mapping[str, Sequence[Source]]
    conversion: Conversion | None = None


def plan_parameters(
    keys: Mapping[str, str], model: PreTrainedModel, wanted: Collection[str]
) -> dict[str, ParameterPlan]:
    """The plans of some of a model's parameters.

    Args:
        keys: The file of each of the checkpoint's tensors.
        model: On the meta device.
        wanted: Names of parameters.

    Raises:
        WeightsError: If tensors that make one of them are not in the checkpoint.
        UnsupportedModelError: If the rows of one cannot be told apart before it is made.
    """
    key_map = KeyMap(model)
    tied = {name: key_map.tied.get(name, name) for name in wanted}
    sought = {*tied, *tied.values()}
    collected: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    conversions: dict[str, Conversion] = {}
    for key in sorted(keys, key=natural_order):
        first, pattern = key_map.target(key)
        conversion = None if pattern is None else key_map.conversion(pattern)
        for target in [first] if conversion is None else conversion.all_targets(first):
            if target in sought:
                collected[target][pattern or ""].append(Source(key, keys[key]))
                if conversion is not None:
                    conversions[target] = conversion
    # Of parameters that are one and the same, the checkpoint has either.
    found = {name: name if name in collected else other for name, other in tied.items()}
    _check_complete(collected, found)
    return {
        name: _checked(ParameterPlan(source, dict(collected[source]), conversions.get(source)), model)
        for name, source in found.items()
    }


def _check_complete(collected: Collection[str], found: Mapping[str, str]) -> None:
    missing = sorted((name for name, source in found.items() if source not in collected), key=natural_order)
    if missing:
        others = f" and for {len(missing) - 1} others" if len(missing) > 1 else ""
        raise WeightsError(
            f"expected tensors for every parameter of the experts, found none for {missing[0]}{others}; "
            f"is it a checkpoint of this architecture?"
        )


def _checked(plan: ParameterPlan, model: PreTrainedModel) -> ParameterPlan:
    conversion = plan.conversion
    if conversion is None or conversion.keeps_rows:
        for sources in plan.sources.values():
            if len(sources) != 1:
                raise WeightsError(
                    f"{plan.name}: expected one tensor, found {len(sources)}: {sources[0].key} and {sources[1].key}"
                )
        return plan
    if not conversion.merges_experts:
        raise UnsupportedModelError(
            f"{plan.name}: expected a layout in which one expert's part can be read alone, found one that transformers "
            f"makes by {', '.join(conversion.operations)}"
        )
    for pattern in conversion.weights:
        if pattern not in plan.sources:
            raise WeightsError(f"{plan.name}: expected tensors like {pattern!r} in the checkpoint, found none")
    num_rows = int(model.get_parameter(plan.name).shape[0])
    parts = {pattern: _rows_of_its_own(plan, conversion, pattern, num_rows) for pattern in plan.sources}
    return ParameterPlan(plan.name, parts, conversion)


def _rows_of_its_own(plan: ParameterPlan, conversion: Conversion, pattern: str, num_rows: int) -> list[Source]:
    """One source for each row of a parameter, of the experts' tensors that it may share with other parameters."""
    sources = plan.sources[pattern]
    numbered = {_expert_number(source.key): source for source in sources}
    expected = num_rows * conversion.num_targets
    missing = [number for number in range(expected) if number not in numbered]
    if missing or len(sources) != expected:
        hint = f"; {_renumbered(sources[0].key, missing[0])} is missing" if missing else ""
        raise WeightsError(
            f"{plan.name}: expected {expected} tensors like {sources[0].key}, found {len(sources)}{hint}"
        )
    first = num_rows * conversion.target_index(plan.name)
    return [numbered[number] for number in range(first, first + num_rows)]


def _expert_number(key: str) -> int:
    return int(key.split(".")[_place_of_number(key)])


def _renumbered(key: str, number: int) -> str:
    parts = key.split(".")
    parts[_place_of_number(key)] = str(number)
    return ".".join(parts)


def _place_of_number(key: str) -> int:
    # An expert's number is the last one in the names of all families: layers and blocks come before.
    parts = key.split(".")
    return max(place for place, part in enumerate(parts) if part.isdigit())
