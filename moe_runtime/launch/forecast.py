"""What a configuration would be on a cluster: where each actor goes, the memory, the load and the traffic."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moe_runtime.config.hosts import is_loopback
from moe_runtime.errors import ConfigError
from moe_runtime.experts.spec import build_module
from moe_runtime.launch.build import build_router
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.ray_backend.addresses import router_addresses, split_address
from moe_runtime.ray_backend.cluster import Cluster
from moe_runtime.ray_backend.placer import NodeShape, place_actors
from moe_runtime.routing.policies.build import build_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.launch.recipes import HostSpec, LayerRecipe, RouterRecipe
    from moe_runtime.ray_backend.placer import Place, Placement
    from moe_runtime.ray_backend.plan import RuntimePlan


@dataclass(frozen=True)
class PlannedNode:
    """A node, and the memory of one of its GPUs where that is known."""

    shape: NodeShape
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True)
class ClusterView:
    """The nodes of a cluster.

    Attributes:
        nodes: The nodes.
        home_id: Id of the node from which the runtime is started: routers at a loopback address run there.
    """

    nodes: tuple[PlannedNode, ...]
    home_id: str


@dataclass(frozen=True)
class ActorForecast:
    """One actor.

    Attributes:
        actor_id: A host's id, or ``router <n>``.
        layer: The layer that it serves a part of, the first one of a group of them; None for a router.
        node: Name of its node; None where it has no place.
        device: ``cpu``, or the GPUs that it gets there.
        weights_bytes: Parameters and buffers of its experts.
        tokens: Assignments per token of its layers, where the gate prefers nobody; of a router, its share of tokens.
        loads: The same by layer; empty for a router.
    """

    actor_id: str
    layer: str | None
    node: str | None
    device: str
    weights_bytes: int
    tokens: float
    loads: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceForecast:
    """The weights on one device, ``memory`` or ``GPU <n>``, against what it holds; None where that is not known."""

    node: str
    device: str
    weights_bytes: int
    total_bytes: int | None


@dataclass(frozen=True)
class LoadForecast:
    """Assignments that a node's experts get per token of a layer."""

    layer: str
    node: str
    tokens: float


@dataclass(frozen=True)
class LinkForecast:
    """Bytes of rows between a node with routers and one with experts, per token of the layer, headers not counted."""

    layer: str
    router_node: str
    expert_node: str
    bytes_there: float
    bytes_back: float


@dataclass(frozen=True)
class Forecast:
    """The whole.

    Attributes:
        name: The runtime's.
        actors: Routers and expert hosts.
        devices: What holds weights.
        loads: Per layer and node.
        links: Between nodes, for links that rows of a layer cross.
        mistakes: Why it cannot run so: what has no place, and what does not fit.
        warnings: What may not be meant so.
    """

    name: str
    actors: tuple[ActorForecast, ...]
    devices: tuple[DeviceForecast, ...]
    loads: tuple[LoadForecast, ...]
    links: tuple[LinkForecast, ...]
    mistakes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def forecast(loaded: LoadedConfig, cluster: ClusterView) -> Forecast:
    """What a configuration would be on a cluster, by the rules that the running controller follows.

    Expected load: the gate prefers nobody, and replicas share their expert's tokens equally, as they do under load.

    Raises:
        ConfigError: If the configuration cannot work on any cluster; one line per mistake.
    """
    config, recipe = loaded.config, build_router(loaded)
    shapes = [node.shape for node in cluster.nodes]
    num_gpus = sum(shape.total.get("GPU", 0.0) for shape in shapes)
    seen = Cluster("", node_id=cluster.home_id, num_gpus=num_gpus, embedded=False, connected_here=False)
    plan = plan_runtime(config, recipe, cluster=seen, detach=True)
    specs = plan_hosts(config, recipe.layers, gpus_available=num_gpus > 0)
    placement = place_actors(shapes, plan.actors)
    hosts = _hosts(specs, recipe, placement)
    routers = _routers(plan, placement)
    devices = tuple(_devices(hosts, cluster.nodes))
    return Forecast(
        name=config.name,
        actors=(*routers, *hosts),
        devices=devices,
        loads=tuple(_loads(hosts)),
        links=tuple(link for layer in recipe.layers for link in _links(layer, routers, hosts)),
        mistakes=(
            *(str(each) for each in placement.unplaceable),
            *_overfull(devices),
            *_address_mistakes(plan, routers, shapes),
        ),
        warnings=tuple(_warnings(plan, routers)),
    )


def _hosts(specs: Sequence[HostSpec], recipe: RouterRecipe, placement: Placement) -> tuple[ActorForecast, ...]:
    sizes: dict[object, int] = {}
    loads = {
        expert.spec.where: tokens
        for layer in recipe.layers
        for expert, tokens in zip(layer.experts, _assignments_per_token(layer), strict=True)
    }
    num_replicas = Counter(hosted.spec.where for spec in specs for hosted in spec.experts)

    def of_layers(spec: HostSpec) -> dict[str, float]:
        sums: dict[str, float] = {}
        for hosted in spec.experts:
            where, layer = hosted.spec.where, hosted.spec.layer
            sums[layer] = sums.get(layer, 0.0) + loads[where] / num_replicas[where]
        return sums

    return tuple(
        ActorForecast(
            actor_id=spec.host_id,
            layer=spec.experts[0].spec.layer,
            node=None if (place := placement.places.get(spec.host_id)) is None else place.node,
            device=_device(spec, place),
            weights_bytes=sum(_weights_bytes(hosted.spec, sizes) for hosted in spec.experts),
            tokens=sum((own := of_layers(spec)).values()),
            loads=own,
        )
        for spec in specs
    )


def _routers(plan: RuntimePlan, placement: Placement) -> tuple[ActorForecast, ...]:
    count = plan.routers.count
    actors = [plan.routers.actor(index) for index in range(count)]
    nodes = [placement.places[actor.actor_id].node if actor.actor_id in placement.places else None for actor in actors]
    return tuple(
        ActorForecast(actor.actor_id, None, node, "cpu", 0, 1 / count)
        for actor, node in zip(actors, nodes, strict=True)
    )


def _device(spec: HostSpec, place: Place | None) -> str:
    if spec.device == "cpu" or place is None:
        return spec.device
    return "GPU " + ", ".join(map(str, place.gpus))


def _weights_bytes(spec: ExpertSpec, known: dict[object, int]) -> int:
    """Bytes of an expert's parameters and buffers, which are not allocated for it."""
    alike = (spec.kind, spec.item_shape, repr(spec.view), repr(spec.options), spec.dtype)
    if alike not in known:
        with torch.device("meta"):
            module = build_module(spec).to(spec.torch_dtype)
        known[alike] = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    return known[alike]


def _assignments_per_token(layer: LayerRecipe) -> list[float]:
    """What each expert gets per token of the layer: shared ones every token, the others equal parts of the choices."""
    choices = build_policy(layer.policy, num_experts=layer.num_routed).mean_k
    return [choices / layer.num_routed] * layer.num_routed + [1.0] * layer.num_shared


def _devices(hosts: Iterable[ActorForecast], nodes: Sequence[PlannedNode]) -> Iterator[DeviceForecast]:
    by_name = {node.shape.name: node for node in nodes}
    weights: Counter[tuple[str, str]] = Counter()
    for host in hosts:
        if host.node is not None:
            # A host with several GPUs computes on the first of them.
            device = "memory" if host.device == "cpu" else host.device.partition(",")[0]
            weights[host.node, device] += host.weights_bytes
    order = list(by_name)
    for node, device in sorted(weights, key=lambda key: (order.index(key[0]), key[1])):
        known = by_name[node]
        memory = known.shape.total.get("memory", math.inf)
        total = known.gpu_memory_bytes if device != "memory" else None if math.isinf(memory) else int(memory)
        yield DeviceForecast(node, device, weights[node, device], total)


def _overfull(devices: Iterable[DeviceForecast]) -> Iterator[str]:
    for each in devices:
        if each.total_bytes is not None and each.weights_bytes > each.total_bytes:
            yield (
                f"{each.node}, {each.device}: expected room for weights of {_gib(each.weights_bytes)}, "
                f"found {_gib(each.total_bytes)}"
            )


def _loads(hosts: Iterable[ActorForecast]) -> Iterator[LoadForecast]:
    loads: dict[tuple[str, str], float] = {}
    for host in hosts:
        for layer, tokens in host.loads.items():
            if host.node is not None:
                loads[layer, host.node] = loads.get((layer, host.node), 0.0) + tokens
    for (layer, node), tokens in loads.items():
        yield LoadForecast(layer, node, tokens)


def _links(
    layer: LayerRecipe, routers: Iterable[ActorForecast], hosts: Sequence[ActorForecast]
) -> Iterator[LinkForecast]:
    row_bytes = getattr(torch, layer.wire_dtype).itemsize
    crossing: dict[tuple[str, str], float] = {}
    for router in routers:
        for host in hosts:
            if layer.name in host.loads and router.node and host.node and router.node != host.node:
                key = (router.node, host.node)
                crossing[key] = crossing.get(key, 0.0) + router.tokens * host.loads[layer.name]
    for (router_node, expert_node), rows in crossing.items():
        yield LinkForecast(
            layer.name,
            router_node,
            expert_node,
            bytes_there=rows * row_bytes * math.prod(layer.item_shape),
            bytes_back=rows * row_bytes * math.prod(layer.out_shape),
        )


def _address_mistakes(plan: RuntimePlan, routers: Sequence[ActorForecast], shapes: Sequence[NodeShape]) -> list[str]:
    ips: Mapping[str, str] = {shape.name: shape.ip or shape.name for shape in shapes}
    nodes = [router.node for router in routers if router.node is not None]
    try:
        router_addresses(plan.routers.address, nodes, ips=[ips[node] for node in nodes])
    except ConfigError as exc:
        return str(exc).splitlines()
    return []


def _warnings(plan: RuntimePlan, routers: Sequence[ActorForecast]) -> Iterator[str]:
    host, _ = split_address(plan.routers.address)
    if routers and is_loopback(host) and routers[0].node is not None:
        yield (
            f"router.address: {plan.routers.address} is a loopback address: "
            f"only clients on {routers[0].node} reach the routers"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
