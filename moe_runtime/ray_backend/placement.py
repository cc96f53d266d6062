"""How a demand becomes Ray's actor options, and what is said when the cluster cannot meet it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_runtime.ray_backend.plan import Demand


def actor_options(demand: Demand) -> dict[str, Any]:
    """What is demanded of a node, but for its labels, as keyword arguments of Ray's ``options``."""
    options: dict[str, Any] = {"num_cpus": demand.num_cpus, "num_gpus": demand.num_gpus}
    if demand.memory_bytes is not None:
        options["memory"] = demand.memory_bytes
    if demand.custom:
        options["resources"] = dict(demand.custom)
    return options


def place_options(demand: Demand, *, node_id: str | None, spread: bool) -> dict[str, Any]:
    """Where an actor may go, as keyword arguments of Ray's ``options``.

    Args:
        demand: Its labels count where no node was chosen.
        node_id: The node that was chosen for it: there or nowhere, and an error, not a wait, where that has no room.
        spread: What Ray is to do where none was.
    """
    if node_id is not None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Failing at once: what the cluster reports as free may be taken already, and others have room.
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False, _fail_on_unavailable=True)}
    options: dict[str, Any] = {"scheduling_strategy": "SPREAD" if spread else "DEFAULT"}
    if demand.node_labels:
        options["label_selector"] = dict(demand.node_labels)
    return options


def demanded_resources(demand: Demand) -> dict[str, float]:
    """The demand under Ray's names of resources, without what is 0."""
    resources = {"CPU": demand.num_cpus, "GPU": demand.num_gpus, "memory": float(demand.memory_bytes or 0)}
    resources |= demand.custom
    return {name: amount for name, amount in resources.items() if amount > 0}


def explain_unmet(
    demand: Demand, *, total: Mapping[str, float], free: Mapping[str, float], nodes: Sequence[Mapping[str, str]]
) -> str:
    """The demand in words, and what the cluster has of it.

    Args:
        demand: What an actor asks for.
        total: Resources of the whole cluster, by Ray's names.
        free: What of them is not reserved.
        nodes: Labels of each living node.
    """
    has = [
        f"{name} {resource_text(name, free.get(name, 0.0))} free of {resource_text(name, total.get(name, 0.0))}"
        for name in demanded_resources(demand)
    ]
    for key, value in demand.node_labels.items():
        num_nodes = sum(labels.get(key) == value for labels in nodes)
        has.append(f"{num_nodes} of {len(nodes)} nodes with label {key}={value}")
    return f"asks for {demand_text(demand)}; the cluster has {', '.join(has) or f'{len(nodes)} nodes'}"


def demand_text(demand: Demand) -> str:
    """What a demand asks for, in words."""
    asked = [f"{name} {resource_text(name, amount)}" for name, amount in demanded_resources(demand).items()]
    asked += [f"label {key}={value}" for key, value in demand.node_labels.items()]
    return ", ".join(asked) or "nothing"


def resource_text(name: str, amount: float) -> str:
    """An amount of a resource, in words; memory in GiB."""
    return f"{amount / (1 << 30):.2f} GiB" if name == "memory" else f"{amount:g}"
