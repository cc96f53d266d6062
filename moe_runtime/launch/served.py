"""What ``serve`` returns: a runtime that serves, to look at it and to end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from moe_runtime.errors import StartError, UnavailableError
from moe_runtime.launch.adding import add_layers, config_of, remove_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from moe_runtime.config.runtime import RuntimeConfig
    from moe_runtime.ray_backend.cluster import Cluster
    from moe_runtime.service.membership import Membership

#: How long requests in flight may take when a runtime is closed whose configuration is not at hand.
DEFAULT_DRAIN_TIMEOUT_S = 30.0
#: As the configuration's default, for the same.
DEFAULT_START_TIMEOUT_S = 60.0


class Session(Protocol):
    """What runs a runtime: actors on Ray, or threads of this process."""

    def addresses(self) -> list[str]:
        """Where clients find the routers."""
        ...

    def describe(self) -> dict[str, Any]:
        """Layers, hosts and routers, as plain values."""
        ...

    def join(self) -> Membership:
        """A place for this program among those who route, beside or instead of the routers."""
        ...

    def dismiss(self, reason: str) -> None:
        """End the memberships of this program, whose callers are told the reason."""
        ...

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Have a callback called when everything is gone for good, with the reason; see ``Runtime.when_lost``."""
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
        self._is_left = False
        self._addresses = tuple(session.addresses())

    @property
    def address(self) -> str:
        """``host:port`` of the first router.

        Raises:
            UnavailableError: If the runtime has none, as with ``router.replicas: 0``.
        """
        if not self._addresses:
            raise UnavailableError(
                "expected a runtime with routers, found router.replicas 0: no client can reach it; programs use its "
                "layers through moe_runtime.launch.library.LayerCaller"
            )
        return self._addresses[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of every router; empty with ``router.replicas: 0``."""
        return self._addresses

    @property
    def config(self) -> RuntimeConfig:
        """What it serves now, with the layers that were added.

        Raises:
            StartError: If that is not known, as of a runtime that was deployed, or its controller does not answer.
        """
        return config_of(self._session).config

    @property
    def start_timeout_s(self) -> float:
        """How long actors of it may take to be placed, and to start."""
        try:
            return self.config.start_timeout_s
        except StartError:
            return DEFAULT_START_TIMEOUT_S

    def join(self) -> Membership:
        """A place for this program among those who route for the runtime: what ``LayerCaller`` is built on.

        Raises:
            StartError: If the runtime's controller does not answer.
        """
        return self._session.join()

    def add_layers(self, layers: Mapping[str, Any], *, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Have the runtime serve some more layers, and return when it does; what runs is left alone.

        Hosts of a layer's ``actor_group`` that run are replaced by others that have its experts, too: add the layers of
        a group at once. A layer that the runtime has already, just so, is nothing to do.

        Args:
            layers: By name, as in a configuration; relative paths are relative to the configuration's folder.
            on_progress: Called with the number of actors that are ready, and of all that there will be.

        Raises:
            ConfigError: If the layers cannot work, or one has the name of another one.
            PlacementError: If the cluster has no room for their actors.
            StartError: If something did not start; then nothing has changed.
            UnavailableError: If it is one of this process and has ended.
        """
        add_layers(self._session, layers, cluster=self._cluster, on_progress=on_progress)

    def remove_layers(self, names: Iterable[str]) -> None:
        """Have the runtime serve some layers no longer, and return when their hosts have ended.

        Hosts that have experts of other layers, too, are replaced by others without these. Whoever calls a layer that
        was removed gets ``UnknownLayerError``.

        Args:
            names: Of the layers.

        Raises:
            ConfigError: If the runtime has no layer of such a name, or another layer needs it.
            StartError: If the controller does not answer, or a host that has other layers cannot be replaced; then
                nothing has changed.
            UnavailableError: If the runtime was closed, or left.
        """
        if self._is_left:
            raise UnavailableError("expected a runtime that runs, found one that was closed or left")
        remove_layers(self._session, names, cluster=self._cluster)

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

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Have a callback called, with the reason, when the cluster of a runtime that was served here is gone for good.

        It is called from another thread. Nothing of the runtime can be reached then, not even to close it, and Ray is
        about to end this process.
        """
        self._session.when_lost(callback)

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
        # Ray must not be used any more when it is shut down.
        self._is_left = True
        self._session.dismiss("it was left")
        if self._cluster is not None:
            self._cluster.disconnect()
