"""Which experts share an actor, on which device, how often, and what the actor asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.launch.recipes import HostedExpert, HostSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import ExpertRecipe, LayerRecipe


def plan_hosts(config: RuntimeConfig, layers: Iterable[LayerRecipe], *, gpus_available: bool) -> tuple[HostSpec, ...]:
    """The expert hosts of all layers: one per group of experts and replica.

    Args:
        config: Gives the device, and how tokens travel.
        layers: The layers.
        gpus_available: What ``device: auto`` looks at: whether the cluster, or this machine, has a GPU.
    """
    return tuple(
        _host(config, layer, group, replica=replica, gpus_available=gpus_available)
        for layer in layers
        for group in pack_experts(layer.experts, experts_per_actor=layer.experts_per_actor)
        for replica in range(group[0].replicas)
    )


def pack_experts(experts: Sequence[ExpertRecipe], *, experts_per_actor: int) -> list[tuple[ExpertRecipe, ...]]:
    """Neighbouring experts with equal resources and replicas, in groups of at most ``experts_per_actor``."""
    groups: list[list[ExpertRecipe]] = []
    for expert in experts:
        group = groups[-1] if groups else []
        if group and len(group) < experts_per_actor and _can_share(group[0], expert):
            group.append(expert)
        else:
            groups.append([expert])
    return [tuple(group) for group in groups]


def _host(
    config: RuntimeConfig,
    layer: LayerRecipe,
    group: Sequence[ExpertRecipe],
    *,
    replica: int,
    gpus_available: bool,
) -> HostSpec:
    resources = group[0].resources
    num_gpus = _num_gpus(config.device, resources.num_gpus, gpus_available=gpus_available)
    return HostSpec(
        host_id=_replica_id(group[0], replica),
        experts=tuple(HostedExpert(_replica_id(expert, replica), expert.spec) for expert in group),
        device="cuda" if num_gpus > 0 else "cpu",
        resources=resources.model_copy(update={"num_gpus": num_gpus}),
        strategy=layer.strategy,
        encryption=config.data_plane.encryption,
        port_range=config.data_plane.port_range,
        network=config.data_plane.network,
        plug_ins=tuple(config.plug_ins),
    )


def _can_share(expert: ExpertRecipe, other: ExpertRecipe) -> bool:
    return expert.resources == other.resources and expert.replicas == other.replicas


def _replica_id(expert: ExpertRecipe, replica: int) -> str:
    return f"{expert.spec.layer}/{expert.spec.name}/{replica}"


def _num_gpus(device: str, num_gpus: float | None, *, gpus_available: bool) -> float:
    if device == "cpu":
        return 0.0
    if num_gpus is not None:
        return num_gpus
    return 1.0 if device == "cuda" or gpus_available else 0.0
