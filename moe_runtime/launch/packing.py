"""Which experts share an actor, on which device, and what the actor asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.launch.recipes import HostedExpert, HostSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import Device, ExpertRecipe, LayerRecipe


def plan_hosts(config: RuntimeConfig, layers: Iterable[LayerRecipe], *, gpus_available: bool) -> tuple[HostSpec, ...]:
    """The expert hosts of all layers.

    Args:
        config: Gives the device, the encryption and the range of ports.
        layers: The layers.
        gpus_available: What ``device: auto`` looks at: whether the cluster, or this machine, has a GPU.
    """
    hosts = []
    for layer in layers:
        for group in pack_experts(layer.experts, experts_per_actor=layer.experts_per_actor):
            resources = group[0].resources
            num_gpus = _num_gpus(config.device, resources.num_gpus, gpus_available=gpus_available)
            device: Device = "cuda" if num_gpus > 0 else "cpu"
            hosts.append(
                HostSpec(
                    host_id=f"{layer.name}/{group[0].spec.name}",
                    experts=tuple(_first_replica(expert) for expert in group),
                    device=device,
                    resources=resources.model_copy(update={"num_gpus": num_gpus}),
                    encryption=config.data_plane.encryption,
                    port_range=config.data_plane.port_range,
                    plug_ins=tuple(config.plug_ins),
                )
            )
    return tuple(hosts)


def pack_experts(experts: Sequence[ExpertRecipe], *, experts_per_actor: int) -> list[tuple[ExpertRecipe, ...]]:
    """Neighbouring experts with equal resources, in groups of at most ``experts_per_actor``."""
    groups: list[list[ExpertRecipe]] = []
    for expert in experts:
        group = groups[-1] if groups else []
        if group and len(group) < experts_per_actor and group[0].resources == expert.resources:
            group.append(expert)
        else:
            groups.append([expert])
    return [tuple(group) for group in groups]


def _first_replica(expert: ExpertRecipe) -> HostedExpert:
    return HostedExpert(replica_id=f"{expert.spec.layer}/{expert.spec.name}/0", spec=expert.spec)


def _num_gpus(device: str, num_gpus: float | None, *, gpus_available: bool) -> float:
    if device == "cpu":
        return 0.0
    if num_gpus is not None:
        return num_gpus
    return 1.0 if device == "cuda" or gpus_available else 0.0
