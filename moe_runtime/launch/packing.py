"""Which experts share an actor, on which device, how often, and what the actor asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.launch.recipes import HostedExpert, HostSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import ExpertRecipe, LayerRecipe


def plan_hosts(config: RuntimeConfig, layers: Iterable[LayerRecipe], *, gpus_available: bool) -> tuple[HostSpec, ...]:
    """The expert hosts of all layers: one per pack of experts and replica, for the layers of a group together.

    Args:
        config: Gives the device, and how tokens travel.
        layers: The layers; those of a group have passed ``group_mistakes``.
        gpus_available: What ``device: auto`` looks at: whether the cluster, or this machine, has a GPU.
    """
    return tuple(
        _host(config, group, place, replica=replica, gpus_available=gpus_available)
        for group in _groups(layers)
        for place, pack in enumerate(pack_layer(group[0]))
        for replica in range(pack[0].replicas)
    )


def pack_layer(layer: LayerRecipe) -> list[tuple[ExpertRecipe, ...]]:
    """The experts of a layer as they share actors: by neighbours with equal resources and replicas."""
    packs: list[list[ExpertRecipe]] = []
    for expert in layer.experts:
        pack = packs[-1] if packs else []
        if pack and len(pack) < layer.experts_per_actor and _can_share(pack[0], expert):
            pack.append(expert)
        else:
            packs.append([expert])
    return [tuple(pack) for pack in packs]


def group_mistakes(layers: Iterable[LayerRecipe]) -> Iterator[str]:
    """One line per layer that cannot share the actors of its group, and why."""
    for first, *others in _groups(layers):
        for layer in others:
            for key, expected, found in _differences(first, layer):
                yield (
                    f"layers.{layer.name}.{key}: expected {expected} as in layer {first.name}, with which it shares "
                    f"actors as actor_group {layer.actor_group}, found {found}"
                )


def _differences(first: LayerRecipe, layer: LayerRecipe) -> Iterator[tuple[str, object, object]]:
    for key in ("experts_per_actor", "strategy"):
        if getattr(first, key) != getattr(layer, key):
            yield key, getattr(first, key), getattr(layer, key)
    if len(first.experts) != len(layer.experts):
        yield "experts", f"{len(first.experts)} experts", len(layer.experts)
        return
    for ours, theirs in zip(first.experts, layer.experts, strict=True):
        where = theirs.spec.where.removeprefix(f"layers.{layer.name}.")
        if ours.replicas != theirs.replicas:
            yield f"{where}.replicas", ours.replicas, theirs.replicas
            return
        if ours.resources != theirs.resources:
            yield f"{where}.resources", _given(ours), _given(theirs)
            return


def _given(expert: ExpertRecipe) -> str:
    return str(expert.resources.model_dump(exclude_defaults=True) or "the defaults")


def _groups(layers: Iterable[LayerRecipe]) -> list[list[LayerRecipe]]:
    """Layers that share actors, each with those of its group, by the first of each."""
    groups: dict[tuple[bool, str], list[LayerRecipe]] = {}
    for layer in layers:
        key = (False, layer.name) if layer.actor_group is None else (True, layer.actor_group)
        groups.setdefault(key, []).append(layer)
    return [*groups.values()]


def _host(
    config: RuntimeConfig,
    group: Sequence[LayerRecipe],
    place: int,
    *,
    replica: int,
    gpus_available: bool,
) -> HostSpec:
    first = group[0]
    packs = [pack_layer(layer)[place] for layer in group]
    resources = packs[0][0].resources
    num_gpus = _num_gpus(config.device, resources.num_gpus, gpus_available=gpus_available)
    own_id = _replica_id(packs[0][0], replica)
    return HostSpec(
        # No layer is called so.
        host_id=own_id if first.actor_group is None else f"group:{first.actor_group}/{place}/{replica}",
        experts=tuple(HostedExpert(_replica_id(expert, replica), expert.spec) for pack in packs for expert in pack),
        device="cuda" if num_gpus > 0 else "cpu",
        resources=resources.model_copy(update={"num_gpus": num_gpus}),
        strategy=first.strategy,
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
