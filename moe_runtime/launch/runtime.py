"""``serve``: a configuration becomes a running system; what runs is changed, restarted or attached to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.load import load_config
from moe_runtime.errors import StartError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.in_process import InProcessSession
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.launch.served import Runtime
from moe_runtime.ray_backend.addresses import split_address
from moe_runtime.ray_backend.cluster import connect, existing_address, is_initialised
from moe_runtime.ray_backend.ports import check_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.launch.recipes import RouterRecipe
    from moe_runtime.logs import LogSettings
    from moe_runtime.ray_backend.changes import Restarted
    from moe_runtime.ray_backend.cluster import Cluster
    from moe_runtime.ray_backend.roll import Upgraded

#: Reservations, not cores, of a cluster that is started for a runtime without routers.
_LIBRARY_CPUS = 64.0


def serve(
    config: str | Path | Mapping[str, Any] | RuntimeConfig,
    *,
    ray: bool = True,
    ray_address: str | None = None,
    address: str | None = None,
    detach: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    logging: LogSettings | None = None,
) -> Runtime:
    """Check a configuration, start it, and return when it serves.

    Uses Ray as it is initialised, and leaves it running; else the cluster at ``ray_address`` or ``RAY_ADDRESS``;
    else it starts Ray in this process, which ends with the runtime. The runtime lives as long as this process
    renews its lease: 10 s without that, and its actors are torn down.

    Args:
        config: Path of a YAML file, a mapping of the same form, or a finished configuration.
        ray: Whether experts and routers are Ray actors; otherwise they are threads of this process.
        ray_address: Address of the cluster to join; ``local`` starts one here.
        address: ``HOST:PORT`` of the first router, instead of the configuration's.
        detach: Let the runtime outlive this process; needs a cluster that does.
        on_progress: Called with the number of actors that are ready, and of all.
        logging: How its actors log, instead of the configuration's; this process's own logging is left alone.

    Raises:
        ConfigError: If the configuration cannot work; one line per mistake.
        AlreadyRunningError: If a runtime of this name runs on the cluster.
        PlacementError: If the cluster has no room for an actor within ``start_timeout_s``.
        StartError: If something did not start, or ``detach`` has no cluster to stay on. Nothing is left behind.
    """
    loaded = _with_changes(load_config(config), address=address, logging=logging)
    if not ray:
        if detach:
            raise StartError("detach: expected ray=True, found False: threads of this process cannot outlive it")
        return _serve_in_process(loaded, on_progress)
    return _serve_on_ray(loaded, ray_address=ray_address, detach=detach, on_progress=on_progress)


def upgrade(
    config: str | Path | Mapping[str, Any] | RuntimeConfig,
    *,
    ray_address: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Upgraded:
    """Roll the running runtime of a configuration's name to that configuration, without losing a request.

    What is new or has changed starts beside what runs; then every router goes over to it between two batches; what is
    old ends when its last request was answered. Unchanged expert hosts are left alone. If anything does not start, the
    runtime serves on as it did. Interrupted at any moment, this may be repeated.

    Args:
        config: Path of a YAML file, a mapping of the same form, or a finished configuration.
        ray_address: Address of the runtime's cluster; ``RAY_ADDRESS``, or Ray as it is initialised, when None.
        on_progress: Called with the number of actors that are ready, and of all that there will be.

    Raises:
        ConfigError: If the configuration cannot work, or changes what cannot change in a runtime that runs.
        PlacementError: If the cluster has no room for what is new beside what runs.
        StartError: If there is no such cluster or runtime, or something did not start.
    """
    loaded = load_config(config)
    recipe = build_router(loaded)
    cluster = _join(ray_address)
    try:
        from moe_runtime.ray_backend.session import attach as attach_session

        session = attach_session(loaded.config.name)
        plan = plan_runtime(loaded.config, recipe, cluster=cluster, detach=True, source=loaded)
        return session.upgrade(plan, on_progress=on_progress)
    finally:
        cluster.disconnect()


def restart(
    name: str = "default", *, experts: bool = True, routers: bool = True, ray_address: str | None = None
) -> Restarted:
    """Give the actors of a running runtime other processes, one after the other, without losing a request.

    Each expert host gets a successor beside it, for which there must be room; each router is drained and comes back at
    its address: clients need to know another one meanwhile. Interrupted at any moment, this may be repeated.

    Args:
        name: The runtime's.
        experts: Whether its expert hosts restart.
        routers: Whether its routers do.
        ray_address: Address of its cluster; ``RAY_ADDRESS``, or Ray as it is initialised, when None.

    Raises:
        PlacementError: If the cluster has no room for one host beside those that run.
        StartError: If there is no such cluster or runtime, or something did not start. The runtime serves as before.
    """
    cluster = _join(ray_address)
    try:
        from moe_runtime.ray_backend.session import attach as attach_session

        return attach_session(name).restart(experts=experts, routers=routers)
    finally:
        cluster.disconnect()


def attach(name: str = "default", *, ray_address: str | None = None) -> Runtime:
    """A runtime that runs already, to look at it or to close it; at the end of a ``with`` it is left running.

    Args:
        name: The runtime's.
        ray_address: Address of its cluster; ``RAY_ADDRESS``, or Ray as it is initialised, when None.

    Raises:
        StartError: If there is no such cluster, or no runtime of this name on it.
    """
    cluster = _join(ray_address)
    try:
        from moe_runtime.ray_backend.session import attach as attach_session

        return Runtime(attach_session(name), cluster=cluster, detached=True)
    except BaseException:
        cluster.disconnect()
        raise


def _join(ray_address: str | None) -> Cluster:
    """Connect to a cluster that is there already."""
    if not is_initialised() and existing_address(ray_address) is None:
        raise StartError(
            "expected the address of a Ray cluster, found none; "
            "set RAY_ADDRESS, or give --ray-address (in Python ray_address)"
        )
    return connect(ray_address)


def _serve_in_process(loaded: LoadedConfig, on_progress: Callable[[int, int], None] | None) -> Runtime:
    config = loaded.config
    recipe = build_router(loaded)
    check_ports(config.router.address, config.router.replicas)
    hosts = plan_hosts(config, recipe.layers, gpus_available=torch.cuda.is_available())
    session = InProcessSession(loaded, recipe, hosts)
    session.start(on_progress)
    return Runtime(session, drain_s=config.router.drain_s)


def _serve_on_ray(
    loaded: LoadedConfig,
    *,
    ray_address: str | None,
    detach: bool,
    on_progress: Callable[[int, int], None] | None,
) -> Runtime:
    starts_ray = not is_initialised() and existing_address(ray_address) is None
    if detach and starts_ray:
        raise StartError(
            "detach: expected a cluster that outlives this process, found none: "
            "start one with `ray start --head`, or give its address"
        )
    # Before the cluster is touched: most mistakes are in the configuration.
    recipe = build_router(loaded)
    router = loaded.config.router
    if starts_ray and is_loopback(split_address(router.address)[0]):
        # On an existing cluster later: there, a runtime of this name may hold the ports.
        check_ports(router.address, router.replicas)
    cluster = connect(ray_address, total_cpus=_cpus_wanted(loaded.config, recipe))
    try:
        # Not before: Ray reads how to authenticate when it is imported.
        from moe_runtime.ray_backend.session import launch

        plan = plan_runtime(loaded.config, recipe, cluster=cluster, detach=detach, source=loaded)
        session = launch(plan, on_progress=on_progress)
        return Runtime(session, cluster=cluster, detached=detach, drain_s=loaded.config.router.drain_s)
    except BaseException:
        cluster.disconnect()
        raise


def _cpus_wanted(config: RuntimeConfig, recipe: RouterRecipe) -> float:
    """What a cluster that is started for a runtime should have."""
    wanted = sum(expert.resources.num_cpus * expert.replicas for layer in recipe.layers for expert in layer.experts)
    # Layers may be added, and hosts that get some more stand beside those that they replace for a while.
    return wanted if config.router.replicas else max(2 * wanted, _LIBRARY_CPUS)


def _with_changes(loaded: LoadedConfig, *, address: str | None, logging: LogSettings | None) -> LoadedConfig:
    if address is None and logging is None:
        return loaded
    # Through the model again, which checks them.
    data = loaded.config.model_dump()
    if address is not None:
        data["router"]["address"] = address
    if logging is not None:
        data["logging"] = vars(logging)
    return replace(loaded, config=load_config(data).config)
