"""One runtime on a Ray cluster, from the side of the process that serves it."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from moe_runtime.errors import ConfigError, MoERuntimeError, PlacementError, StartError
from moe_runtime.ray_backend.connection import LOST, Connection
from moe_runtime.ray_backend.depot import start_depot
from moe_runtime.ray_backend.ending import end_actors
from moe_runtime.ray_backend.head_watch import HeadWatch, patience_s
from moe_runtime.ray_backend.member import RayMember
from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.node_watch import RayView
from moe_runtime.ray_backend.plan import Failure
from moe_runtime.ray_backend.ports import check_ports
from moe_runtime.ray_backend.ray_spawner import find_actor
from moe_runtime.ray_backend.roll import ChangedMeanwhileError
from moe_runtime.ray_backend.starting import await_start, create_controller
from moe_runtime.ray_backend.whereabouts import locate

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.changes import Restarted, RestartTerms
    from moe_runtime.ray_backend.deployment import DepotPlan
    from moe_runtime.ray_backend.plan import RoutersPlan, RuntimePlan
    from moe_runtime.ray_backend.processes import RouterFactory
    from moe_runtime.ray_backend.roll import Upgraded

_LOG = logging.getLogger(__name__)

_RENEW_EVERY_S = 2.0
_PROGRESS_EVERY_S = 0.2
_POLL_EVERY_S = 0.05
#: Beyond what the controller allows itself.
_SPARE_S = 30.0
_ERRORS: dict[str, type[MoERuntimeError]] = {
    each.__name__: each for each in (ChangedMeanwhileError, ConfigError, PlacementError)
}


class RaySession:
    """A runtime whose actors run on Ray. ``launch`` and ``attach`` make one; ``close`` ends the runtime.

    Attributes:
        name: The runtime's.
    """

    def __init__(self, controller: Any, *, name: str, renews_lease: bool) -> None:
        """Take over a controller that has started, and renew its lease from now on, if that is asked."""
        self.name = name
        self._connection = Connection()
        self._controller = controller
        self._closed = threading.Event()
        self._on_lost: Callable[[str], None] | None = None
        self._members: WeakSet[RayMember] = WeakSet()
        self._renewing: threading.Thread | None = None
        if renews_lease:
            self._renewing = threading.Thread(target=self._renew, name="moe-lease", daemon=True)
            self._renewing.start()

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Have a callback called with the reason, from another thread, when the cluster is gone for good.

        Only a session that renews a lease looks for that.
        """
        self._on_lost = callback

    def addresses(self) -> list[str]:
        """Where clients find the routers.

        Raises:
            StartError: If the controller does not answer.
        """
        addresses: list[str] = self._ask("addresses")
        return addresses

    def describe(self) -> dict[str, Any]:
        """Hosts and routers with their states, as plain values.

        Raises:
            StartError: If the controller does not answer.
        """
        description: dict[str, Any] = self._ask("describe")
        if not description["routers"]:
            # The controller knows of layers what routers say, and has no torch to say it itself.
            factory = self._router_factory()
            description |= factory.describe(self._ask("table"))
        return description

    def join(self) -> RayMember:
        """A place for this program among those who route.

        Raises:
            StartError: If the controller does not answer.
        """
        location = locate()
        transport = self._router_factory().open_transport(location)
        member = RayMember(self._controller, transport, name=self.name, node=location.node)
        self._members.add(member)
        return member

    def source(self) -> bytes:
        """What the runtime's plan was made from, pickled; empty if that is not known.

        Raises:
            StartError: If the controller does not answer.
        """
        source: bytes = self._ask("source")
        return source

    def upgrade(
        self,
        plan: RuntimePlan,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        instead_of: bytes | None = None,
    ) -> Upgraded:
        """Roll the runtime to another plan while requests go on, and return when nothing else of the old one is left.

        A controller that is restarted meanwhile is asked again.

        Args:
            plan: The desired state.
            on_progress: Called with the number of actors that are ready, and of all that there will be.
            instead_of: The source of the plan that it was made from, if it must not take another one's place.

        Raises:
            ChangedMeanwhileError: If another one runs by now.
            ConfigError: If the plan changes what cannot change while a runtime runs.
            PlacementError: If the cluster has no room for it beside what runs.
            StartError: If it did not start, or the controller does not answer. The runtime serves in any case.
        """
        is_over = threading.Event()
        watcher = threading.Thread(target=self._show_progress, args=(on_progress, is_over), daemon=True)
        if on_progress is not None:
            # Not for nobody: at the end of a process no thread can start.
            watcher.start()
        try:
            timeout_s = 2 * plan.start_timeout_s + plan.routers.let_go_s + _SPARE_S
            outcome = self._ask("upgrade", plan, instead_of, timeout_s=timeout_s)
        finally:
            is_over.set()
            if on_progress is not None:
                watcher.join()
        upgraded: Upgraded = _unless_failed(outcome)
        return upgraded

    def restart(self, *, experts: bool, routers: bool) -> Restarted:
        """Give expert hosts, and then routers, other processes while requests go on.

        Raises:
            PlacementError: If the cluster has no room for one host beside those that run.
            StartError: If something did not start, or the controller does not answer. The runtime serves in any case.
        """
        terms: RestartTerms = self._ask("restart_terms")
        generation = terms.generation if experts else 0
        outcome = self._ask("restart", generation, routers, timeout_s=terms.timeout_s + _SPARE_S)
        restarted: Restarted = _unless_failed(outcome)
        return restarted

    def close(self, *, drain_timeout_s: float) -> bool:
        """Drain and end the runtime; whether every request was answered. Safe to call twice."""
        if self._closed.is_set():
            return True
        self.dismiss("it was closed")
        try:
            return bool(self._ask("close", drain_timeout_s, timeout_s=drain_timeout_s + _SPARE_S))
        except StartError as exc:
            _LOG.warning("%s; its actors %s", exc, "are ended" if self._connection.is_there else "are left alone")
            return False
        finally:
            self.detach()
            if self._connection.is_there:
                end_actors(self.name)

    def dismiss(self, reason: str) -> None:
        """End the memberships of this program, whose callers are told the reason."""
        for member in list(self._members):
            member.dismiss(reason)

    def detach(self) -> None:
        """Stop renewing the lease, and leave the runtime to itself."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join()

    def _router_factory(self) -> RouterFactory:
        plan: RoutersPlan = self._ask("routers_plan")
        factory: RouterFactory = pickle.loads(plan.factory)  # nosec B301  # from the controller, by Ray
        return factory

    def _renew(self) -> None:
        is_renewed = True
        context = ray.get_runtime_context()
        head = HeadWatch(RayView(context.gcs_address, context.get_node_id()).is_reached, limit_s=patience_s())
        while not self._closed.wait(_RENEW_EVERY_S):
            if not self._connection.is_there:
                _LOG.error("runtime %s: %s; its lease is not renewed", self.name, LOST)
                return
            if (reason := head.look()) is not None:
                lost = f"runtime {self.name} is lost: {reason}"
                _LOG.error(lost)
                if self._on_lost is not None:
                    self._on_lost(lost)
                return
            try:
                # Bounded, and then just tried again: a controller that restarts starts with a full lease.
                warnings = ray.get(self._controller.renew.remote(), timeout=_RENEW_EVERY_S)
            except RayError as exc:
                if is_renewed and not self._closed.is_set():
                    reason = type(exc).__name__
                    _LOG.warning("runtime %s: its lease is not renewed at the moment: %s", self.name, reason)
                is_renewed = False
                continue
            is_renewed = True
            for warning in warnings:
                _LOG.warning("runtime %s: %s", self.name, warning)

    def _show_progress(self, on_progress: Callable[[int, int], None] | None, is_over: threading.Event) -> None:
        while on_progress is not None and not is_over.wait(_PROGRESS_EVERY_S):
            with contextlib.suppress(RayError):
                on_progress(*ray.get(self._controller.progress.remote(), timeout=_SPARE_S))

    def _ask(self, method: str, *arguments: Any, timeout_s: float = _SPARE_S) -> Any:
        """The controller's answer, also if Ray restarts it meanwhile: everything asked here may be asked twice."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._connection.expect(self.name)
            try:
                answer = getattr(self._controller, method).remote(*arguments)
                return ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except (RayError, GetTimeoutError) as exc:
                if not isinstance(exc, ActorUnavailableError) or time.monotonic() > deadline:
                    raise StartError(f"runtime {self.name}: its controller does not answer: {exc}") from exc
            time.sleep(_POLL_EVERY_S)


def _unless_failed(outcome: Any) -> Any:
    if isinstance(outcome, Failure):
        raise _ERRORS.get(outcome.error, StartError)(outcome.message)
    return outcome


def launch(
    plan: RuntimePlan, *, depot: DepotPlan | None = None, on_progress: Callable[[int, int], None] | None = None
) -> RaySession:
    """Start a runtime on the connected cluster and return when it serves.

    Args:
        plan: The desired state.
        depot: Serves the files that the runtime is deployed from.
        on_progress: Called with the number of actors that are ready, and of all, a few times a second.

    Raises:
        AlreadyRunningError: If a runtime of this name is there.
        ConfigError: If a router's port is above 65535.
        PlacementError: If the cluster has no room for it.
        StartError: If it did not start; nothing of it is left behind.
    """
    controller = create_controller(plan)
    try:
        end_actors(plan.name, but=controller_name(plan.name))
        if plan.routers.node_id is not None:
            # On this machine. Only now: a runtime of this name, or what is left of one, may hold the ports.
            check_ports(plan.routers.address, plan.routers.count)
        if depot is not None:
            start_depot(plan.name, depot)
        failure = await_start(controller, plan, on_progress)
        if failure is not None:
            raise (PlacementError if failure.error == PlacementError.__name__ else StartError)(failure.message)
        return RaySession(controller, name=plan.name, renews_lease=plan.lease_s is not None)
    except BaseException:
        end_actors(plan.name)
        raise


def attach(name: str) -> RaySession:
    """A runtime that runs on the connected cluster; whoever served it still answers for its lease.

    Raises:
        StartError: If no runtime of this name runs there.
    """
    controller = find_actor(controller_name(name))
    if controller is None:
        raise StartError(f"runtime {name}: expected it to run on this cluster, found no controller of that name")
    return RaySession(controller, name=name, renews_lease=False)
