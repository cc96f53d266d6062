"""How a model's experts are to live in actors: what callers choose, checked before anything is loaded or started."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, Strict, ValidationError

from moe_runtime.config.experts import ResourcesConfig
from moe_runtime.config.mistakes import describe_mistakes
from moe_runtime.config.strict import MAX_SECONDS, Name, StrictModel
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

OnFailure = Literal["wait", "drop"]
#: What experts compute in.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What callers say of a model's experts.

    Attributes:
        experts_per_actor: Neighbouring experts that share an actor; it has them in every MoE layer of the model.
        replicas: Actors that serve each expert.
        resources: What an expert asks of the cluster, as ``resources`` of the configuration; nothing special when
            empty.
        exact: Whether outputs are bit-identical to the model's in one process.
        on_failure: What becomes of tokens whose expert cannot be had: ``wait`` for it to come back, up to the
            runtime's ``start_timeout_s``, or ``drop`` it from the token's sum.
        name: Prefix of the layers' names, or the name of the runtime that is started; chosen when None.
        start_timeout_s: Bounds the start of a runtime that is started for the experts; None where none is.

    Raises:
        ConfigError: If a value is none that these can have; the message has one line per mistake.
    """

    experts_per_actor: int = 1
    replicas: int = 1
    resources: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    on_failure: OnFailure = "wait"
    name: str | None = None
    start_timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Check every value, also where layers that are there already make some of them moot."""
        try:
            _Values.model_validate({each.name: getattr(self, each.name) for each in fields(self)})
        except ValidationError as exc:
            raise ConfigError("\n".join(describe_mistakes(exc, model=_Values))) from exc


class _Values(StrictModel):
    """What the attributes of a placement can be; a text is no number here, since it does not come from a file."""

    experts_per_actor: Annotated[int, Strict()] = Field(ge=1, le=65536)
    replicas: Annotated[int, Strict()] = Field(ge=1, le=1024)
    resources: ResourcesConfig
    exact: Annotated[bool, Strict()]
    on_failure: OnFailure
    name: Name | None
    start_timeout_s: Annotated[float, Strict()] | None = Field(gt=0, le=MAX_SECONDS)


def chosen_dtype(wanted: object) -> torch.dtype | None:
    """The dtype of experts that a caller names; None for ``auto``, which is what the checkpoint says.

    Raises:
        ConfigError: If there is no such dtype, or experts cannot compute in it.
    """
    if isinstance(wanted, str) and wanted == "auto":
        return None
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ConfigError(f"dtype: expected auto or one of {names}, found {wanted!r}")
    return found
