"""``teardown``: a runtime ends, and every node is rid of what it left there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.errors import StartError
from moe_runtime.experts.weights_cache import Removed, default_cache
from moe_runtime.launch.bundle_store import BundleStore
from moe_runtime.launch.deploy import expect_cluster
from moe_runtime.launch.served import DEFAULT_DRAIN_TIMEOUT_S
from moe_runtime.ray_backend.cluster import connect
from moe_runtime.transport.ipc_folder import default_ipc_folder, sweep_ipc

if TYPE_CHECKING:
    from collections.abc import Callable

_CLEAN_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Cleaned:
    """What was removed from one node, or from all of them.

    Attributes:
        weights: Cached weight files.
        bundles: Bundles.
        num_sockets: ipc sockets of the dead.
    """

    weights: Removed = field(default_factory=Removed)
    bundles: Removed = field(default_factory=Removed)
    num_sockets: int = 0

    def __add__(self, other: Cleaned) -> Cleaned:
        return Cleaned(
            _sum(self.weights, other.weights), _sum(self.bundles, other.bundles), self.num_sockets + other.num_sockets
        )


@dataclass(frozen=True)
class TornDown:
    """What a teardown did.

    Attributes:
        name: The runtime's.
        ran: Whether it ran.
        all_answered: Whether every request was answered before it ended.
        cleaned: What was removed, on all nodes together.
        unreachable: One line per node that could not be cleaned.
    """

    name: str
    ran: bool
    all_answered: bool
    cleaned: Cleaned
    unreachable: tuple[str, ...] = ()

    @property
    def did_nothing(self) -> bool:
        """Whether there was nothing of this runtime; sockets of the dead may be anybody's."""
        removed = self.cleaned.weights.num_files + self.cleaned.bundles.num_files
        return not self.ran and removed == 0 and not self.unreachable


def teardown(
    name: str = "default",
    *,
    ray_address: str | None = None,
    drain_timeout_s: float = DEFAULT_DRAIN_TIMEOUT_S,
    on_step: Callable[[str], None] | None = None,
) -> TornDown:
    """End a runtime, requests in flight first, and remove its files from every node. May be repeated.

    Args:
        name: The runtime's.
        ray_address: Its cluster, of which this machine is a node; ``RAY_ADDRESS``, or Ray as it is initialised,
            when None.
        drain_timeout_s: How long the requests in flight may take.
        on_step: Called with a line for people after each step.

    Raises:
        StartError: If there is no such cluster.
    """
    expect_cluster(ray_address)
    cluster = connect(ray_address)
    try:
        return _tear_down(name, drain_timeout_s, on_step or (lambda _line: None))
    finally:
        cluster.disconnect()


def clean_node(name: str) -> Cleaned:
    """Remove from this machine what a runtime that has ended left there; other runtimes' files stay."""
    weights = default_cache().release(name)
    bundles = BundleStore().remove(name)
    folder = default_ipc_folder()
    # The dead of this runtime bound theirs long ago; a moment's grace is for hosts of others that are binding now.
    num_sockets = sweep_ipc(folder, min_age_s=1.0)
    with suppress(OSError):
        # Not empty: another runtime's, or none at all.
        folder.rmdir()
    return Cleaned(weights, bundles, num_sockets)


def _tear_down(name: str, drain_timeout_s: float, on_step: Callable[[str], None]) -> TornDown:
    # Not before: Ray reads how to authenticate when it is imported.
    from moe_runtime.ray_backend.ending import end_actors, has_actors
    from moe_runtime.ray_backend.node_calls import ask_nodes
    from moe_runtime.ray_backend.nodes import living_nodes
    from moe_runtime.ray_backend.session import attach

    ran = has_actors(name)
    all_answered = True
    if ran:
        try:
            all_answered = attach(name).close(drain_timeout_s=drain_timeout_s)
        except StartError:
            # Without a controller there is nobody to drain.
            all_answered = False
            end_actors(name)
        on_step(f"ended {name}")
    answers = ask_nodes(clean_node, name, nodes=living_nodes(), timeout_s=_CLEAN_TIMEOUT_S)
    return TornDown(
        name=name,
        ran=ran,
        all_answered=all_answered,
        cleaned=sum((answer.value for answer in answers if answer.error is None), Cleaned()),
        unreachable=tuple(
            f"node {answer.node.name}: expected it to remove its files, found: {answer.error}; "
            f"run `moe-runtime teardown {name}` again"
            for answer in answers
            if answer.error is not None
        ),
    )


def _sum(one: Removed, other: Removed) -> Removed:
    return Removed(one.num_files + other.num_files, one.num_bytes + other.num_bytes)
