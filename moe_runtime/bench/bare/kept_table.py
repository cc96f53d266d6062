"""The routing table of a runtime on Ray, asked of one of its expert actors: Ray's control, not on a token's way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from moe_runtime.bench.errors import BenchError
from moe_runtime.ray_backend.names import NAMESPACE, expert_name

if TYPE_CHECKING:
    from moe_runtime.service.routing_table import RoutingTable


def kept_table(runtime: str, host_key: str) -> RoutingTable:
    """The table that the controller published; every actor keeps it.

    Args:
        runtime: The runtime's name.
        host_key: The key of one of its expert hosts.

    Raises:
        BenchError: If the actor keeps none.
    """
    actor = ray.get_actor(expert_name(runtime, host_key), namespace=NAMESPACE)
    snapshot: Any = ray.get(actor.kept.remote())
    if snapshot is None:
        raise BenchError(f"expert host {host_key}: expected it to keep a routing table, found none")
    table: RoutingTable = snapshot.table
    return table
