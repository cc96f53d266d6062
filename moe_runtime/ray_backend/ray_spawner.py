"""The port ``Spawner`` on Ray: named, detached actors in one namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayError

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.expert_actor import ExpertActor
from moe_runtime.ray_backend.names import NAMESPACE, belongs_to, expert_key, expert_name, router_index, router_name
from moe_runtime.ray_backend.nodes import living_nodes
from moe_runtime.ray_backend.placement import actor_options, explain_unmet, place_options
from moe_runtime.ray_backend.plan import Failure
from moe_runtime.ray_backend.router_actor import RouterActor
from moe_runtime.ray_backend.spawner import AwayError, NodeRefusedError
from moe_runtime.ray_backend.whereabouts import end_process_here, locate
from moe_runtime.transport.ipc_folder import default_ipc_folder, remove_ipc, sweep_ipc

if TYPE_CHECKING:
    from collections.abc import Collection

    from moe_runtime.ray_backend.placer import NodeShape
    from moe_runtime.ray_backend.plan import (
        Demand,
        HostHealth,
        HostPlan,
        HostReport,
        Location,
        RouterReport,
        RoutersPlan,
        RuntimePlan,
        Snapshot,
    )
    from moe_runtime.service.online_bias import AskedCounts
    from moe_runtime.service.ports import Endpoint

#: A call may be lost with its actor; whoever called decides what then.
_DETACHED = {"lifetime": "detached", "namespace": NAMESPACE, "max_task_retries": 0}


class RayActor:
    """One actor of the runtime; implements ``ActorHandle``."""

    def __init__(self, actor: Any) -> None:
        """Wrap Ray's handle."""
        self._actor = actor
        self._location: Location | None = None

    async def locate(self) -> Location:
        """Where it runs; answers as soon as it is placed."""
        location: Location = await self._call(self._actor.locate.remote())
        self._location = location
        return location

    async def keep(self, snapshot: Snapshot) -> bool:
        """Hand it the newest snapshot; False if it is gone."""
        try:
            await self._actor.keep.remote(snapshot)
        except RayError:
            return False
        return True

    async def kept(self) -> Snapshot | None:
        """The newest snapshot that it was given; None if it has none or is gone."""
        snapshot: Snapshot | None = await self._ask(self._actor.kept.remote())
        return snapshot

    async def wait(self) -> str:
        """Return when it no longer serves or is dead, with the reason."""
        try:
            return str(await self._actor.wait.remote())
        except RayError as exc:
            return _in_words(exc)

    async def stop(self) -> None:
        """Make it stop serving."""
        await self._ask(self._actor.stop.remote())

    async def kill(self) -> None:
        """End its process at once, for good."""
        ray.kill(self._actor, no_restart=True)
        # Ray asks the process first, and gives one that is frozen five seconds.
        self._end_here()

    def _end_here(self) -> bool:
        """End its process if that is on this node; whether it was."""
        return self._location is not None and end_process_here(self._location)

    async def _call(self, answer: Any) -> Any:
        try:
            value = await answer
        except ActorUnschedulableError as exc:
            raise NodeRefusedError(_in_words(exc)) from exc
        except ActorUnavailableError as exc:
            raise AwayError(_in_words(exc)) from exc
        except RayError as exc:
            raise StartError(_in_words(exc)) from exc
        if isinstance(value, Failure):
            raise StartError(str(value))
        return value

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except RayError:
            return None


class RayHost(RayActor):
    """One expert actor; implements ``HostHandle``."""

    async def ping(self) -> HostHealth | None:
        """How it is, as soon as it answers; None while it has not started."""
        health: HostHealth | None = await self._call(self._actor.ping.remote())
        return health

    async def start(self, num_threads: int) -> HostReport:
        """Start it, once."""
        report: HostReport = await self._call(self._actor.start.remote(num_threads))
        return report

    async def admit(self, public_keys: Collection[str]) -> None:
        """Have it let routers with these keys connect from other nodes, and no others."""
        await self._call(self._actor.admit.remote(public_keys))


class RayRouter(RayActor):
    """One router actor; implements ``RouterHandle``."""

    async def ping(self) -> str | None:
        """What of it stands still, as soon as it answers."""
        still: str | None = await self._call(self._actor.ping.remote())
        return still

    async def restart(self) -> None:
        """End its process at once, for another in the same place."""
        if not self._end_here():
            ray.kill(self._actor, no_restart=False)

    async def start(self, address: str, plan: RoutersPlan) -> RouterReport:
        """Start it, once, and get its bound address and its key."""
        report: RouterReport = await self._call(self._actor.start.remote(address, plan))
        return report

    async def prepare(self, plan: RoutersPlan) -> None:
        """Have it build what a plan's routers serve, while it serves on."""
        await self._call(self._actor.prepare.remote(plan))

    async def oldest_table_version(self) -> int | None:
        """The oldest version of the table that a request may still use; None if it does not know, or is gone."""
        version: int | None = await self._ask(self._actor.oldest_table_version.remote())
        return version

    async def describe(self) -> dict[str, Any] | None:
        """Its layers, experts and replicas; None if it is gone."""
        description: dict[str, Any] | None = await self._ask(self._actor.describe.remote())
        return description

    async def status(self) -> dict[str, Any] | None:
        """Its counters and load; None if it is gone."""
        status: dict[str, Any] | None = await self._ask(self._actor.status.remote())
        return status

    async def asked(self, layers: Collection[str]) -> AskedCounts | None:
        """What its process was asked for in these layers; None if it has not started, or is gone."""
        counts: AskedCounts | None = await self._ask(self._actor.asked.remote(layers))
        return counts

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all were answered."""
        return bool(await self._ask(self._actor.drain.remote(timeout_s)))


class RaySpawner:
    """Creates and finds the actors of one runtime; implements ``Spawner``."""

    def __init__(self, name: str) -> None:
        """Serve the runtime of that name."""
        self._name = name

    def find_host(self, plan: HostPlan) -> RayHost | None:
        """The living actor of a host, of this revision, if there is one."""
        actor = find_actor(expert_name(self._name, plan.key))
        return None if actor is None else RayHost(actor)

    def others(self, plan: RuntimePlan | None) -> tuple[list[RayHost], list[RayRouter]]:
        """Living hosts and routers of the runtime that a plan does not name; all of them where there is no plan."""
        known = set() if plan is None else {expert_name(self._name, host.key) for host in plan.hosts}
        num_routers = 0 if plan is None else plan.routers.count
        names = [name for name in actor_names(self._name) if name not in known]
        hosts = [name for name in names if expert_key(name, self._name) is not None]
        indices = {name: router_index(name, self._name) for name in names}
        routers = [name for name, index in indices.items() if index is not None and index >= num_routers]
        return (
            [RayHost(actor) for actor in map(find_actor, hosts) if actor is not None],
            [RayRouter(actor) for actor in map(find_actor, routers) if actor is not None],
        )

    def nodes(self) -> tuple[NodeShape, ...]:
        """The nodes that are alive, and what is free on them."""
        return living_nodes()

    def spawn_host(self, plan: HostPlan, *, node_id: str | None) -> RayHost:
        """A new expert actor, which dies once: the controller replaces it."""
        place = place_options(plan.demand, node_id=node_id, spread=plan.strategy == "spread")
        options = {**_DETACHED, **actor_options(plan.demand), **place, "max_restarts": 0}
        return RayHost(_create(ExpertActor, (plan.factory,), name=expert_name(self._name, plan.key), options=options))

    def find_router(self, index: int) -> RayRouter | None:
        """The living actor of a router, restarting ones included, if there is one."""
        actor = find_actor(router_name(self._name, index))
        return None if actor is None else RayRouter(actor)

    def spawn_router(self, plan: RoutersPlan, index: int, *, node_id: str | None) -> RayRouter:
        """A new router actor, which Ray restarts for ever, as long as its node lives."""
        place = place_options(plan.demand, node_id=node_id, spread=True)
        options = {**_DETACHED, **actor_options(plan.demand), **place, "max_restarts": -1}
        return RayRouter(_create(RouterActor, (), name=router_name(self._name, index), options=options))

    def explain(self, demand: Demand) -> str:
        """The demand in words, and what the cluster has."""
        return explain_unmet(
            demand,
            total=ray.cluster_resources(),
            free=ray.available_resources(),
            nodes=[node.get("Labels", {}) for node in ray.nodes() if node["Alive"]],
        )

    def sweep(self) -> None:
        """Remove the ipc sockets that dead hosts left on this node."""
        sweep_ipc(default_ipc_folder())

    def clean_up(self, endpoint: Endpoint) -> None:
        """Remove the ipc socket of a dead or killed host, if it was on this node."""
        if endpoint.local is not None and endpoint.node == locate().node:
            remove_ipc(endpoint.local)


def find_actor(name: str) -> Any:
    """Ray's handle of a living named actor; None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def actor_names(runtime: str) -> list[str]:
    """The names of a runtime's living actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and belongs_to(a["name"], runtime)]


def _create(actor_class: type, arguments: tuple[Any, ...], *, name: str, options: dict[str, Any]) -> Any:
    try:
        return ray.remote(actor_class).options(name=name, **options).remote(*arguments)
    except (ValueError, TypeError, RayError) as exc:
        raise StartError(f"actor {name} could not be created: {exc}") from exc


def _in_words(exc: RayError) -> str:
    """The first line of Ray's message that says something, and its class."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no details'}"
