"""What makes a host or a router what it is, as one short hash: an upgrade leaves alone what keeps its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from moe_runtime.experts.weights import verify

if TYPE_CHECKING:
    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.launch.recipes import HostSpec, LayerRecipe, RouterRecipe

_NUM_CHARS = 12
#: Of a layer, what is hashed otherwise, or is nothing to a router.
_NOT_ROUTED = (
    "gate",
    "gate_weights",
    "gate_seed",
    "experts",
    "experts_per_actor",
    "actor_group",
    "strategy",
    "balance",
)
#: Routers and their addresses are of the plan; what they serve is not theirs.
_NOT_SERVED = {"replicas", "address", "node_labels"}


def host_revision(spec: HostSpec, *, threads: str | int, listed: Mapping[str, str]) -> str:
    """Changes with whatever a host that runs would do differently: its experts, their weights, device, resources.

    Where an expert is in its layer is nothing to it, nor where other hosts are.

    Args:
        spec: The host.
        threads: As configured.
        listed: sha256 of weight files that are known already, by their path.
    """
    own = _without(spec, "experts", "strategy", "host_id")
    experts = [[hosted.replica_id, _expert(hosted.spec, listed)] for hosted in spec.experts]
    return _hash([own, experts, threads])


def routers_revision(recipe: RouterRecipe, *, listed: Mapping[str, str]) -> str:
    """Changes with whatever routers that run would do differently: layers, gates, rules, names of experts, queues.

    Args:
        recipe: The routers.
        listed: sha256 of weight files that are known already, by their path.
    """
    queues = {key: value for key, value in _plain(recipe.router).items() if key not in _NOT_SERVED}
    return _hash([[_layer(layer, listed) for layer in recipe.layers], queues])


def _layer(layer: LayerRecipe, listed: Mapping[str, str]) -> Any:
    own = _without(layer, *_NOT_ROUTED)
    gate = layer.gate.model_dump(mode="json", exclude={"weights"})
    experts = [[expert.spec.name, expert.spec.kind] for expert in layer.experts]
    return [own, gate, experts, _content(layer.gate_weights, listed, seed=layer.gate_seed)]


def _expert(spec: ExpertSpec, listed: Mapping[str, str]) -> Any:
    return [_without(spec, "expert_id", "weights", "seed"), _content(spec.weights, listed, seed=spec.seed)]


def _content(weights: str | None, listed: Mapping[str, str], *, seed: int) -> str:
    """What parameters are made from: the same content elsewhere is the same, other content in its place is not."""
    if weights is None:
        return f"seed:{seed}"
    if weights in listed:
        return listed[weights]
    # A file that only its node has is known by its name alone.
    return verify(weights) if Path(weights).is_file() else weights


def _without(value: Any, *names: str) -> Any:
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.name not in names}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _without(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _hash(value: Any) -> str:
    # Whatever YAML gives beside JSON's types, dates for one, is equal where its text is.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_NUM_CHARS]
