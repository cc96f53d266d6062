"""How soon a cluster gets over one fault at a time: noticed, answered by others, back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.chaos.cluster import Cluster
    from moe_runtime.chaos.ledger import Ledger
    from moe_runtime.chaos.reference import Reference


async def measure_recovery(cluster: Cluster, *, seed: int, reference: Reference, ledger: Ledger) -> Mapping[str, Any]:
    return {}
