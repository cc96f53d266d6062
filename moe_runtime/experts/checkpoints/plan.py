"""Which tensors of a checkpoint make each parameter of its experts, found from names alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import WeightsError
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
        sources: By source pattern of the conversion, the tensors in the order of the parameter's rows; a parameter
            that is copied has one.
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
        WeightsError: If nothing in the checkpoint makes one of them.
    """
    key_map = KeyMap(model)
    collected: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    conversions: dict[str, Conversion] = {}
    for key in sorted(keys, key=natural_order):
        target, pattern = key_map.target(key)
        if target not in wanted:
            continue
        collected[target][pattern or ""].append(Source(key, keys[key]))
        if pattern is not None and target not in conversions:
            conversions[target] = key_map.conversion(pattern)
    missing = sorted(set(wanted) - set(collected), key=natural_order)
    if missing:
        raise WeightsError(
            f"expected tensors for every parameter of the experts, found none for {missing[0]} "
            f"and {len(missing) - 1} others"
        )
    return {name: ParameterPlan(name, dict(found), conversions.get(name)) for name, found in collected.items()}
