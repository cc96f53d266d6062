"""The desired state of a runtime on Ray, from its recipes."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from moe_runtime.config.hosts import is_loopback
from moe_runtime.launch.balance import bias_rules
from moe_runtime.launch.factories import ExpertProcessFactory, RouterProcessFactory
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.revisions import host_revision, routers_revision
from moe_runtime.launch.weights_recipe import WeightsRecipe
from moe_runtime.ray_backend.addresses import split_address
from moe_runtime.ray_backend.plan import Demand, HostPlan, ReplicaPlan, RoutersPlan, RuntimePlan

if TYPE_CHECKING:
    from moe_runtime.config.experts import ResourcesConfig
    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import HostSpec, RouterRecipe
    from moe_runtime.logs import LogSettings
    from moe_runtime.ray_backend.cluster import Cluster

_SECURITY_FILES = ("security.tls.cert", "security.tls.key", "security.tls.client_ca", "security.tokens")
#: Without a sign of life from the process that serves, its runtime is torn down after so long.
LEASE_S = 10.0


def plan_runtime(
    config: RuntimeConfig,
    recipe: RouterRecipe,
    *,
    cluster: Cluster,
    detach: bool,
    weights: WeightsRecipe | None = None,
    source: LoadedConfig | None = None,
) -> RuntimePlan:
    """What the controller keeps alive.

    Args:
        config: Gives name, device, threads and timeouts.
        recipe: What the routers serve, and the experts.
        cluster: Where it will run.
        detach: Whether it lives without a lease.
        weights: How its processes come by weight files; paths of their nodes and addresses work without.
        source: What layers may be added to while it runs.

    Raises:
        WeightsError: If a weight file cannot be read.
    """
    weights = weights or WeightsRecipe(config.name)
    hosts = plan_hosts(config, recipe.layers, gpus_available=cluster.num_gpus > 0)
    return RuntimePlan(
        name=config.name,
        hosts=tuple(
            _host_plan(spec, weights, config=config, max_forward_s=_max_forward_s(spec, recipe)) for spec in hosts
        ),
        routers=_routers_plan(recipe, weights, node_id=cluster.node_id, logging=config.logging.settings),
        num_threads=None if config.threads == "auto" else config.threads,
        start_timeout_s=config.start_timeout_s,
        lease_s=None if detach else LEASE_S,
        deployment=weights.deployment,
        logging=config.logging.settings,
        balance=bias_rules(recipe.layers),
        source=b"" if source is None else pickle.dumps(source),
    )


def _routers_plan(recipe: RouterRecipe, weights: WeightsRecipe, *, node_id: str, logging: LogSettings) -> RoutersPlan:
    router = recipe.router
    factory = RouterProcessFactory(recipe, weights.only(layer.gate_weights for layer in recipe.layers), logging)
    host, _ = split_address(router.address)
    # Only this machine reaches a loopback address, and the one who serves is on it, unless labels say otherwise.
    is_pinned = is_loopback(host) and not router.node_labels
    return RoutersPlan(
        count=router.replicas,
        address=router.address,
        factory=pickle.dumps(factory),
        node_id=node_id if is_pinned else None,
        node_labels=router.node_labels,
        revision=routers_revision(recipe, listed=weights.listed),
        fixed=_fixed(recipe),
        let_go_s=recipe.limits.max_timeout_s + max((layer.timeout_s for layer in recipe.layers), default=0.0),
    )


def _fixed(recipe: RouterRecipe) -> dict[str, str]:
    """What routers that run cannot change: where they are found, what their server accepts, how hosts know them."""
    limits = {f"limits.{key}": str(value) for key, value in recipe.limits.model_dump().items()}
    return {
        "router.address": recipe.router.address,
        "router.node_labels": str(dict(sorted(recipe.router.node_labels.items()))),
        "data_plane.encryption": recipe.encryption,
        "security.insecure": str(recipe.security.insecure),
        **{key: recipe.security.files.get(key, "null") for key in _SECURITY_FILES},
        **{f"metrics.{key}": str(value) for key, value in recipe.metrics.model_dump().items()},
        **limits,
    }


def _max_forward_s(spec: HostSpec, recipe: RouterRecipe) -> float:
    """After so long nobody waits for a forward of this host any more."""
    layers = {hosted.spec.layer for hosted in spec.experts}
    return max(layer.timeout_s for layer in recipe.layers if layer.name in layers)


def _host_plan(spec: HostSpec, weights: WeightsRecipe, *, config: RuntimeConfig, max_forward_s: float) -> HostPlan:
    # A host that knows of no other file can fetch no other.
    own_weights = weights.only(hosted.spec.weights for hosted in spec.experts)
    return HostPlan(
        host_id=spec.host_id,
        replicas=tuple(
            ReplicaPlan(hosted.spec.layer, hosted.spec.expert_id, hosted.replica_id) for hosted in spec.experts
        ),
        demand=_demand(spec.resources),
        factory=pickle.dumps(ExpertProcessFactory(spec, own_weights, config.name, config.logging.settings)),
        strategy=spec.strategy,
        twins=spec.twins,
        revision=host_revision(spec, threads=config.threads, listed=weights.listed),
        max_forward_s=max_forward_s,
    )


def _demand(resources: ResourcesConfig) -> Demand:
    return Demand(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus or 0.0,
        memory_bytes=resources.memory_bytes,
        max_rss_bytes=resources.max_rss_bytes,
        custom=resources.custom,
        node_labels=resources.node_labels,
    )
