"""The nodes that are there: a running cluster's, or this machine as a cluster of its own."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_runtime.launch.forecast import ClusterView, PlannedNode
from moe_runtime.ray_backend.cluster import connect, existing_address, is_initialised
from moe_runtime.ray_backend.placer import NodeShape
from moe_runtime.ray_backend.plan import NODE_ID_LABEL

if TYPE_CHECKING:
    from moe_runtime.config.runtime import RuntimeConfig

_THIS_MACHINE = "this machine"


def present_nodes(config: RuntimeConfig, *, ray_address: str | None) -> ClusterView:
    """Where a configuration would be served now.

    Args:
        config: The configuration: a cluster that is started for it here has the CPUs that it asks for.
        ray_address: Address of a cluster; ``RAY_ADDRESS``, or Ray as it is initialised, when None.

    Raises:
        StartError: If the cluster cannot be joined.
    """
    if not is_initialised() and existing_address(ray_address) is None:
        return _this_machine(config)
    cluster = connect(ray_address)
    try:
        # Not before: Ray reads how to authenticate when it is imported.
        from moe_runtime.ray_backend.nodes import living_nodes

        return ClusterView(tuple(PlannedNode(shape) for shape in living_nodes()), home_id=cluster.node_id)
    finally:
        cluster.disconnect()


def _this_machine(config: RuntimeConfig) -> ClusterView:
    experts = [expert for layer in config.layers.values() for expert in layer.experts]
    demanded = sum(expert.resources.num_cpus * expert.count * expert.replicas for expert in experts)
    num_gpus = torch.cuda.device_count()
    total = {
        # As `serve` starts it: reservations, not cores.
        "CPU": float(max(len(os.sched_getaffinity(0)), math.ceil(demanded))),
        "GPU": float(num_gpus),
        "memory": _available_bytes(),
    }
    gpu_memory = torch.cuda.get_device_properties(0).total_memory if num_gpus else None
    shape = NodeShape(
        _THIS_MACHINE,
        node_id=_THIS_MACHINE,
        labels={NODE_ID_LABEL: _THIS_MACHINE},
        total=total,
        ip="127.0.0.1",
    )
    return ClusterView((PlannedNode(shape, gpu_memory),), home_id=_THIS_MACHINE)


def _available_bytes() -> float:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return math.inf if found is None else float(found[1]) * 1024
