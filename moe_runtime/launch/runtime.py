"""``serve``: a configuration becomes a running system, and what it returns ends it again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.load import load_config
from moe_runtime.errors import StartError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.in_process import InProcessSession
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.ray_backend.addresses import split_address
from moe_runtime.ray_backend.cluster import connect, existing_address, is_initialised
from moe_runtime.ray_backend.ports import check_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.logs import LogSettings
    from moe_runtime.ray_backend.cluster import Cluster
    from moe_runtime.ray_backend.roll import Upgraded

#: How long requests in flight may take when a runtime is closed whose configuration is not at hand.
DEFAULT_DRAIN_TIMEOUT_S = 30.0


class Session(Protocol):
    """What runs a runtime: actors on Ray, or threads of this process."""

    def addresses(self) -> list[str]:
        """Where clients find the routers."""
        ...

    def describe(self) -> dict[str, Any]:
        """Layers, hosts and routers, as plain values."""
        ...

    def close(self, *, drain_timeout_s: float) -> bool:
        """Drain and end everything; whether every request was answered. Safe to call twice."""
        ...


class Runtime:
    """A runtime that serves. A context manager: at its end it is closed, or, if detached, left running."""

    def __init__(
        self,
        session: Session,
        *,
        cluster: Cluster | None = None,
        detached: bool = False,
        drain_s: float = DEFAULT_DRAIN_TIMEOUT_S,
    ) -> None:
        """Take over what ``serve`` started."""
        self._drain_s = drain_s
        self._session = session
        self._cluster = cluster
        self._detached = detached
        self._addresses = tuple(session.addresses())

    @property
    def address(self) -> str:
        """``host:port`` of the first router."""
        return self._addresses[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of every router."""
        return self._addresses

    def describe(self) -> dict[str, Any]:
        """What runs where: name, addresses, table version, layers, hosts and routers, as plain values.

        Raises:
            StartError: If the runtime's controller does not answer.
        """
        return self._session.describe()

    def close(self, drain_timeout_s: float | None = None) -> bool:
        """End the runtime: routers refuse new requests and answer those in flight, then everything stops.

        Args:
            drain_timeout_s: How long the requests in flight may take; what is not answered then gets
                ``UnavailableError``. None is ``router.drain_s`` of the configuration that was served here, and
                30 s for a runtime that was attached to.

        Returns:
            Whether every request was answered in time. Safe to call twice.
        """
        try:
            return self._session.close(drain_timeout_s=self._drain_s if drain_timeout_s is None else drain_timeout_s)
        finally:
            self._disconnect()

    def leave(self) -> None:
        """Let the runtime run on without this object.

        Raises:
            StartError: If it was served here without ``detach``: it would end when its lease does.
        """
        if not self._detached:
            raise StartError("expected a runtime that was served with detach=True, found one with a lease; close it")
        self._disconnect()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._detached:
            self.leave()
        else:
            self.close()

    def _disconnect(self) -> None:
        if self._cluster is not None:
            self._cluster.disconnect()


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
        plan = plan_runtime(loaded.config, recipe, cluster=cluster, detach=True)
        return session.upgrade(plan, on_progress=on_progress)
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
    session = InProcessSession(recipe, hosts, num_threads=None if config.threads == "auto" else config.threads)
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
    demands = [expert.resources.num_cpus for layer in recipe.layers for expert in layer.experts]
    cluster = connect(ray_address, total_cpus=sum(demands))
    try:
        # Not before: Ray reads how to authenticate when it is imported.
        from moe_runtime.ray_backend.session import launch

        plan = plan_runtime(loaded.config, recipe, cluster=cluster, detach=detach)
        session = launch(plan, on_progress=on_progress)
        return Runtime(session, cluster=cluster, detached=detach, drain_s=router.drain_s)
    except BaseException:
        cluster.disconnect()
        raise


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
