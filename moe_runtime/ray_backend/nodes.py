"""The nodes of the connected cluster, as the placer sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

# Ray's public list of nodes does not say what is free on each.
from ray._private.state import available_resources_per_node

from moe_runtime.ray_backend.placer import NodeShape
from moe_runtime.ray_backend.whereabouts import node_name

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A resource that only the head has, one of it.
_HEAD = "node:__internal_head__"
_SLIVER = 0.001


def living_nodes() -> tuple[NodeShape, ...]:
    """The nodes that are alive, the head first, the others by name."""
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    shapes = [
        (
            _HEAD not in node["Resources"],
            NodeShape(
                name=node_name(node["NodeManagerAddress"], node["NodeID"]),
                node_id=node["NodeID"],
                labels=dict(node.get("Labels") or {}),
                total=_demandable(node["Resources"]),
                # A node that has not reported yet is a new one.
                free=_demandable(free.get(node["NodeID"], node["Resources"])),
                ip=node["NodeManagerAddress"],
            ),
        )
        for node in alive
    ]
    return tuple(shape for _, shape in sorted(shapes, key=lambda ranked: (ranked[0], ranked[1].name)))


def on_head() -> dict[str, dict[str, float]]:
    """Ray's options for an actor that is to be on the head: without the head there is no cluster anyway.

    Nothing where no node says that it is the head.
    """
    has_head = any(_HEAD in node["Resources"] for node in ray.nodes() if node["Alive"])
    return {"resources": {_HEAD: _SLIVER}} if has_head else {}


def _demandable(resources: Mapping[str, float]) -> dict[str, float]:
    """Without what no actor of ours asks for."""
    return {k: v for k, v in resources.items() if k != "object_store_memory" and not k.startswith("node:")}
