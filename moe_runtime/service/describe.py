"""What a router tells its clients about a layer, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_runtime.service.layer import ExpertInfo, RoutedLayer
    from moe_runtime.service.lineup import Lineup
    from moe_runtime.service.routing_table import Replica, RoutingTable


def describe_lineup(lineup: Lineup) -> dict[str, Any]:
    """All layers, and the version of the table."""
    table = lineup.table
    layers = {name: describe_layer(layer, table) for name, layer in lineup.layers.items()}
    return {"table_version": table.version, "layers": layers}


def describe_layer(layer: RoutedLayer, table: RoutingTable) -> dict[str, Any]:
    """Shapes, rules and experts of a layer, with the replicas that the table lists."""
    return {
        "item_shape": list(layer.item_shape),
        "out_shape": list(layer.out_shape),
        "dtype": str(layer.dtype).removeprefix("torch."),
        "policy": layer.policy_kind,
        "k": layer.policy.max_k,
        "gate_features": layer.gate_features,
        "residual": layer.residual,
        "capacity_factor": layer.capacity.factor,
        "batch_coupled": layer.is_batch_coupled,
        "num_shared": layer.num_shared,
        "tasks": list(layer.gate.tasks),
        "default_task": layer.gate.default_task,
        "balance": table.biases[layer.name].describe() if layer.name in table.biases else None,
        "experts": [_describe_expert(expert, layer, table) for expert in layer.experts],
    }


def _describe_expert(expert: ExpertInfo, layer: RoutedLayer, table: RoutingTable) -> dict[str, Any]:
    replicas = table.replicas.get((layer.name, expert.expert_id), ())
    return {
        "expert_id": expert.expert_id,
        "name": expert.name,
        "kind": expert.kind,
        "shared": expert.expert_id >= layer.num_routed,
        "replicas": [_describe_replica(replica) for replica in replicas],
    }


def _describe_replica(replica: Replica) -> dict[str, Any]:
    return {
        "replica_id": replica.replica_id,
        "state": str(replica.state),
        "reason": replica.reason,
        "node": replica.endpoint.node,
        "device": replica.device,
        "pid": replica.pid,
        "num_restarts": replica.num_restarts,
        "incarnation": f"{replica.endpoint.incarnation:016x}",
        "weights_version": replica.weights_version,
    }
