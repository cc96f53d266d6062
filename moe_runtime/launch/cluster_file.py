"""The nodes of a cluster that is not up yet, from a file: a list of nodes, or what ``ray up`` takes."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from moe_runtime.config.mistakes import describe_mistakes
from moe_runtime.config.strict import StrictModel
from moe_runtime.config.yaml_file import read_yaml
from moe_runtime.errors import ConfigError
from moe_runtime.launch.forecast import PlannedNode
from moe_runtime.ray_backend.placer import NodeShape
from moe_runtime.ray_backend.plan import NODE_ID_LABEL

if TYPE_CHECKING:
    from pathlib import Path

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
_AMOUNT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*((?:[KMGT]I?)?)B?\s*$", re.IGNORECASE)
_MEMORY_KEYS = ("memory",)


class NodeGroup(StrictModel):
    """Nodes that are alike."""

    name: str = Field(description="Of the node; `<name>-<n>` where `count` is above 1.")
    count: int = Field(1, ge=1, le=4096, description="How many.")
    resources: dict[str, float | str] = Field(description="`CPU`, `GPU`, `memory` (bytes, or 64GiB) and custom ones.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes.")
    gpu_memory: float | str | None = Field(None, description="Memory of one GPU: bytes, or 80GiB; null is unknown.")

    @field_validator("resources")
    @classmethod
    def _amounts(cls, resources: dict[str, float | str]) -> dict[str, float | str]:
        return {name: _amount(name, amount) for name, amount in resources.items()}

    @field_validator("gpu_memory")
    @classmethod
    def _bytes(cls, gpu_memory: float | str | None) -> float | str | None:
        return None if gpu_memory is None else _amount("memory", gpu_memory)


class NodeList(StrictModel):
    """A plain list of nodes."""

    nodes: list[NodeGroup] = Field(min_length=1, description="The nodes; the first is where clients deploy from.")


def read_nodes(path: Path) -> tuple[PlannedNode, ...]:
    """The nodes that a file describes, the head first.

    Args:
        path: A list under the key ``nodes``, or a file of ``ray up``, of which every node type counts with its
            ``max_workers``.

    Raises:
        ConfigError: If the file cannot be read, or says too little about its nodes; one line per mistake.
    """
    data = read_yaml(path)
    if not isinstance(data, Mapping) or not {"nodes", "provider"} & set(data):
        raise ConfigError(f"{path.name}: expected a mapping with the key nodes, or a file for ray up with provider")
    if "nodes" in data:
        return _from_list(data, origin=path.name)
    provider = data["provider"] if isinstance(data["provider"], Mapping) else {}
    if provider.get("type") == "local":
        return _from_local(data, provider, origin=path.name)
    return _from_node_types(data, origin=path.name)


def _from_list(data: Mapping[Any, Any], *, origin: str) -> tuple[PlannedNode, ...]:
    try:
        groups = NodeList.model_validate(dict(data)).nodes
    except ValidationError as exc:
        lines = describe_mistakes(exc, model=NodeList)
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from exc
    return _distinct([node for group in groups for node in _expand(group)], origin=origin)


def _from_node_types(data: Mapping[Any, Any], *, origin: str) -> tuple[PlannedNode, ...]:
    types, head = data.get("available_node_types"), data.get("head_node_type")
    if not isinstance(types, Mapping) or head not in types:
        raise ConfigError(f"{origin}: expected available_node_types with the head_node_type, found {head!r}")
    nodes = []
    for name in sorted(types, key=lambda name: name != head):
        shape = types[name] if isinstance(types[name], Mapping) else {}
        count = 1 if name == head else shape.get("max_workers", data.get("max_workers", 0))
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"{origin}: available_node_types.{name}.max_workers: expected a number, found {count!r}")
        resources = shape.get("resources") or {}
        if "CPU" not in resources:
            raise ConfigError(
                f"{origin}: available_node_types.{name}.resources: expected CPU (and GPU, memory), found none; "
                "what the cloud would fill in is not known before it does"
            )
        if count:
            group = {"name": str(name), "count": count, "resources": resources, "labels": shape.get("labels") or {}}
            nodes.append(group)
    return _from_list({"nodes": nodes}, origin=origin)


def _from_local(data: Mapping[Any, Any], provider: Mapping[Any, Any], *, origin: str) -> tuple[PlannedNode, ...]:
    head, workers = provider.get("head_ip"), provider.get("worker_ips") or []
    if not isinstance(head, str) or not all(isinstance(ip, str) for ip in workers):
        raise ConfigError(f"{origin}: provider: expected head_ip and worker_ips, found {dict(provider)!r}")
    nodes = []
    for ip, key in ((head, "head_start_ray_commands"), *((ip, "worker_start_ray_commands") for ip in workers)):
        flags = _start_flags([str(command) for command in data.get(key) or []])
        total: dict[str, float] = {"CPU": _number(flags, "num-cpus", math.inf), "GPU": _number(flags, "num-gpus", 0.0)}
        total["memory"] = _number(flags, "memory", math.inf)
        total |= {str(name): float(amount) for name, amount in _json(flags, "resources", origin=origin).items()}
        labels = dict(pair.partition("=")[::2] for pair in flags.get("labels", "").split(",") if pair)
        nodes.append(_node(ip, total=total, labels=labels, ip=ip))
    return _distinct(nodes, origin=origin)


def _start_flags(commands: list[str]) -> dict[str, str]:
    """The flags of the ``ray start`` among some shell commands."""
    command = next((c for c in commands if "ray start" in c), "")
    words = shlex.split(command.partition("ray start")[2].partition(";")[0])
    flags: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            flags[name] = value if equals else after
    return flags


def _number(flags: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(flags[name])
    except (KeyError, ValueError):
        return default


def _json(flags: Mapping[str, str], name: str, *, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(flags.get(name) or "{}")
    except ValueError as exc:
        raise ConfigError(f"{origin}: ray start --{name}: expected JSON, found {flags[name]}") from exc
    return value if isinstance(value, dict) else {}


def _expand(group: NodeGroup) -> list[PlannedNode]:
    names = [group.name] if group.count == 1 else [f"{group.name}-{i}" for i in range(group.count)]
    total = {"memory": math.inf, **{name: float(amount) for name, amount in group.resources.items()}}
    gpu_memory = None if group.gpu_memory is None else int(float(group.gpu_memory))
    return [_node(name, total=total, labels=group.labels, gpu_memory=gpu_memory) for name in names]


def _node(
    name: str, *, total: Mapping[str, float], labels: Mapping[str, str], ip: str = "", gpu_memory: int | None = None
) -> PlannedNode:
    shape = NodeShape(name, node_id=name, labels={**labels, NODE_ID_LABEL: name}, total=total, ip=ip)
    return PlannedNode(shape, gpu_memory_bytes=gpu_memory)


def _distinct(nodes: list[PlannedNode], *, origin: str) -> tuple[PlannedNode, ...]:
    names = [node.shape.name for node in nodes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{origin}: expected nodes with names of their own, found {', '.join(twice)} more than once")
    return tuple(nodes)


def _amount(name: str, amount: float | str) -> float:
    """A number; of memory also one with a unit."""
    if isinstance(amount, str):
        found = _AMOUNT.match(amount) if name in _MEMORY_KEYS else None
        if found is None:
            wanted = "a number of bytes, or 64GiB" if name == "memory" else "a number"
            raise ValueError(f"{name}: expected {wanted}, found {amount!r}")
        unit = found[2].upper()
        amount = float(found[1]) * (_BINARY_UNITS[unit] if unit in _BINARY_UNITS else _UNITS[unit])
    if not 0 <= amount < math.inf:
        raise ValueError(f"{name}: expected a number of at least 0, found {amount}")
    return float(amount)
