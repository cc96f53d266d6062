"""``deploy`` and ``upgrade``: a configuration and its files become what runs on a cluster, whatever was done before."""

from __future__ import annotations

import importlib
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.load import load_config
from moe_runtime.errors import StartError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.bundle_store import BundleStore
from moe_runtime.launch.node_checks import PACKAGE, check, expectation, lacking
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.launch.weights_recipe import WeightsRecipe
from moe_runtime.ray_backend.cluster import connect, existing_address, is_initialised
from moe_runtime.ray_backend.deployment import DepotPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_runtime.config.load import LoadedConfig
    from moe_runtime.launch.bundle_store import StoredBundle
    from moe_runtime.launch.node_checks import Expectation
    from moe_runtime.ray_backend.cluster import Cluster
    from moe_runtime.ray_backend.placer import NodeShape
    from moe_runtime.ray_backend.plan import RuntimePlan
    from moe_runtime.ray_backend.roll import Upgraded
    from moe_runtime.ray_backend.session import RaySession

_CHECK_TIMEOUT_S = 60.0
_INSTALL_TIMEOUT_S = 600.0
_LOOK_FOR_NODES_EVERY_S = 0.2


def _ignore_step(_line: str) -> None:
    return


def _ignore_progress(_num_ready: int, _num_actors: int) -> None:
    return


@dataclass(frozen=True)
class DeployOptions:
    """How to deploy.

    Attributes:
        install: Install on the nodes, with pip, what they lack.
        wheel: A wheel of this package to install there.
        num_nodes: Nodes to wait for, at most ``start_timeout_s``, where the runtime is not there yet.
        on_step: Called with a line for people after each step.
        on_progress: Called with the number of actors that are ready, and of all, a few times a second.
    """

    install: bool = False
    wheel: Path | None = None
    num_nodes: int = 1
    on_step: Callable[[str], None] = _ignore_step
    on_progress: Callable[[int, int], None] = _ignore_progress


@dataclass(frozen=True)
class Deployed:
    """A runtime that serves.

    Attributes:
        name: The runtime's.
        deployment: Id of the bundle that it was deployed from.
        addresses: ``host:port`` of every router.
        layers: Names of its layers.
        num_nodes: Nodes of the cluster that were checked; 0 where it ran already.
        ran_already: Whether there was nothing to do.
    """

    name: str
    deployment: str
    addresses: tuple[str, ...]
    layers: tuple[str, ...]
    num_nodes: int
    ran_already: bool


def deploy(config: str | Path, *, ray_address: str | None = None, options: DeployOptions | None = None) -> Deployed:
    """Start a configuration on a Ray cluster as a detached runtime, and return when it serves.

    Bundles the configuration and the files that it names by relative paths, checks every node, and starts the
    runtime; each expert host then fetches its own experts' files. Whatever of this was interrupted, at any moment
    and by any signal, may be repeated. A runtime that serves the same bundle already is left as it is.

    Args:
        config: The YAML file, or the manifest of a bundle that was brought to this machine.
        ray_address: The cluster, of which this machine is a node; ``RAY_ADDRESS``, or Ray as it is initialised,
            when None.
        options: Whether to install what nodes lack, and who is told of the progress.

    Raises:
        ConfigError: If the configuration cannot work; one line per mistake.
        AlreadyRunningError: If another configuration runs under its name.
        PlacementError: If the cluster has no room for an actor within ``start_timeout_s``.
        StartError: If there is no such cluster, a node lacks something, or something did not start.
    """
    with _deployment(config, ray_address, options) as deployment:
        return deployment.run()


def upgrade(config: str | Path, *, ray_address: str | None = None, options: DeployOptions | None = None) -> Upgraded:
    """Roll the running runtime of a configuration's name to that configuration and its files, without losing a request.

    Bundles and checks as ``deploy`` does; then ``moe_runtime.upgrade`` says what happens. May be repeated.

    Args:
        config: As for ``deploy``.
        ray_address: As for ``deploy``.
        options: As for ``deploy``.

    Raises:
        ConfigError: If the configuration cannot work, or changes what cannot change in a runtime that runs.
        PlacementError: If the cluster has no room for what is new beside what runs.
        StartError: If there is no such cluster or runtime, a node lacks something, or something did not start.
    """
    with _deployment(config, ray_address, options) as deployment:
        return deployment.upgrade()


def expect_cluster(ray_address: str | None) -> None:
    """Check that there is a cluster of which this machine may be a node.

    Raises:
        StartError: If no address is given, or that of a Ray client's server.
    """
    if is_initialised():
        return
    address = existing_address(ray_address)
    if address is None:
        raise StartError(
            "expected the address of a Ray cluster, found none; "
            "set RAY_ADDRESS, or give --ray-address or --cluster (in Python ray_address)"
        )
    if address.startswith("ray://"):
        raise StartError(
            f"expected the address of a cluster that this machine is a node of, found {address}: its nodes could not "
            f"fetch files from here; run this on the head, or give --cluster with its `ray up` file"
        )


@contextmanager
def _deployment(config: str | Path, ray_address: str | None, options: DeployOptions | None) -> Iterator[_Deployment]:
    """A configuration, bundled on this machine, and the cluster that it is for."""
    expect_cluster(ray_address)
    stored = BundleStore().store(Path(config))
    loaded = load_config(stored.config)
    cluster = connect(ray_address)
    try:
        yield _Deployment(stored, loaded, cluster, options or DeployOptions())
    finally:
        cluster.disconnect()


@dataclass(frozen=True)
class _Deployment:
    """One run of ``deploy`` or ``upgrade``, on a connected cluster."""

    stored: StoredBundle
    loaded: LoadedConfig
    cluster: Cluster
    options: DeployOptions = field(default_factory=DeployOptions)

    def run(self) -> Deployed:
        # Not before: Ray reads how to authenticate when it is imported.
        from moe_runtime.ray_backend.standing import join_deployment

        bundle = self.stored.bundle
        self._say_bundle()
        timeout_s = 2 * self.loaded.config.start_timeout_s
        session = join_deployment(bundle.runtime, bundle.id, timeout_s=timeout_s, on_progress=self.options.on_progress)
        if session is not None:
            return self._outcome(session, num_nodes=0)
        num_nodes = self._prepare_nodes()
        return self._outcome(self._launch(), num_nodes=num_nodes)

    def upgrade(self) -> Upgraded:
        # Not before: Ray reads how to authenticate when it is imported.
        from moe_runtime.ray_backend.depot import end_depots, start_depot
        from moe_runtime.ray_backend.session import attach

        runtime = self.stored.bundle.runtime
        self._say_bundle()
        session = attach(runtime)
        self._prepare_nodes()
        start_depot(runtime, self._depot())
        try:
            return session.upgrade(self._plan(), on_progress=self.options.on_progress)
        finally:
            # Of the old one and the new one, that which the runtime does not need; it says itself which.
            end_depots(runtime, but=session.describe()["deployment"])

    def _say_bundle(self) -> None:
        bundle = self.stored.bundle
        self.options.on_step(f"bundle {bundle.id[:12]}: {len(bundle.files)} files, {size_text(bundle.num_bytes)}")

    def _prepare_nodes(self) -> int:
        """Check every node, and install there what may be installed; the number of nodes."""
        from moe_runtime.ray_backend.node_calls import installed_on

        nodes = self._await_nodes()
        expected = expectation(self.loaded.config.plug_ins)
        answers = installed_on(nodes, expected.distributions, timeout_s=_CHECK_TIMEOUT_S)
        lacks = lacking(expected, answers)
        if self.options.install and lacks:
            for node in nodes:
                if node.name in lacks:
                    self._install(node, lacks[node.name], expected)
            # This process may have looked for a plug-in before it was there.
            importlib.invalidate_caches()
            expected = expectation(self.loaded.config.plug_ins)
            answers = installed_on(nodes, expected.distributions, timeout_s=_CHECK_TIMEOUT_S)
        check(expected, answers)
        self.options.on_step(f"checked {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}")
        return len(nodes)

    def _await_nodes(self) -> tuple[NodeShape, ...]:
        """The nodes that are there, when there are as many as was asked for; else, in the end, those that are."""
        from moe_runtime.ray_backend.nodes import living_nodes

        wanted, timeout_s = self.options.num_nodes, self.loaded.config.start_timeout_s
        nodes = living_nodes()
        if len(nodes) < wanted:
            self.options.on_step(f"{len(nodes)} of {wanted} nodes have joined; waiting for the others")
        give_up_at = time.monotonic() + timeout_s
        while len(nodes) < wanted:
            if time.monotonic() > give_up_at:
                self.options.on_step(
                    f"{len(nodes)} of {wanted} nodes have joined within {timeout_s:g} s; going on without the others"
                )
                break
            time.sleep(_LOOK_FOR_NODES_EVERY_S)
            nodes = living_nodes()
        return nodes

    def _install(self, node: NodeShape, lacks: tuple[str, ...], expected: Expectation) -> None:
        from moe_runtime.ray_backend.node_calls import install_on

        requirements = [expected.plug_ins[name] for name in lacks if name in expected.plug_ins]
        wheel = self.options.wheel if PACKAGE in lacks else None
        wheels = {} if wheel is None else {wheel.name: wheel.read_bytes()}
        if not requirements and not wheels:
            return
        self.options.on_step(f"installing {', '.join([*requirements, *wheels])} on node {node.name}")
        (answer,) = install_on((node,), requirements, wheels=wheels, timeout_s=_INSTALL_TIMEOUT_S)
        error = answer.error or answer.value
        if error is not None:
            raise StartError(f"node {node.name}: expected pip to install {', '.join(requirements)}, found: {error}")

    def _launch(self) -> RaySession:
        from moe_runtime.ray_backend.session import launch

        return launch(self._plan(), depot=self._depot(), on_progress=self.options.on_progress)

    def _plan(self) -> RuntimePlan:
        bundle = self.stored.bundle
        weights = WeightsRecipe(bundle.runtime, bundle.id, self.stored.listed)
        recipe = build_router(self.loaded, nodes_have_paths=True)
        return plan_runtime(self.loaded.config, recipe, cluster=self.cluster, detach=True, weights=weights)

    def _depot(self) -> DepotPlan:
        return DepotPlan(self.stored.bundle.id, self.stored.paths, node_id=self.cluster.node_id)

    def _outcome(self, session: RaySession, *, num_nodes: int) -> Deployed:
        return Deployed(
            name=self.stored.bundle.runtime,
            deployment=self.stored.bundle.id,
            addresses=tuple(session.addresses()),
            layers=tuple(self.loaded.config.layers),
            num_nodes=num_nodes,
            ran_already=num_nodes == 0,
        )


def size_text(num_bytes: int) -> str:
    """A number of bytes for people: ``12.3 MB``."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
