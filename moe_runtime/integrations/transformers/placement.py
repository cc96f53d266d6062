"""How a model's experts are to live in actors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

OnFailure = Literal["wait", "drop"]


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
        name: Prefix of the layers' names; chosen when None.
    """

    experts_per_actor: int = 1
    replicas: int = 1
    resources: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    on_failure: OnFailure = "wait"
    name: str | None = None
