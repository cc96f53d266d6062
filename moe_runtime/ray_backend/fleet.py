"""The keepers of one plan's hosts and routers; the fleet of a newer plan shares those that need not change."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError, PlacementError, StartError
from moe_runtime.ray_backend.addresses import next_address, router_addresses
from moe_runtime.ray_backend.host_keeper import HostKeeper
from moe_runtime.ray_backend.router_keeper import RouterKeeper
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from moe_runtime.ray_backend.plan import HostPlan, Location, RuntimePlan
    from moe_runtime.ray_backend.seat import Tools
    from moe_runtime.service.routing_table import Replica

Keeper = HostKeeper | RouterKeeper


class Fleet:
    """Everything that one plan keeps alive. Owned by the controller's event loop.

    Attributes:
        plan: The plan.
        hosts: Keepers of its hosts, in the plan's order.
        routers: Keepers of its routers, by their index.
        new: Those of both that the fleet before did not have.
    """

    def __init__(
        self,
        plan: RuntimePlan,
        *,
        tools: Tools,
        on_change: Callable[[], None],
        on_outgrown: Callable[[HostKeeper, str], None],
        before: Fleet | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            plan: What to keep alive.
            tools: What all new keepers work with.
            on_change: Called whenever the routing table has to change.
            on_outgrown: Called when a host should have a successor, with the reason.
            before: The fleet whose place this one will take.
        """
        self.plan = plan
        self._chooser = tools.chooser
        self._before = before
        hosts: dict[str, HostKeeper] = {} if before is None else {keeper.plan.key: keeper for keeper in before.hosts}
        routers: dict[int, RouterKeeper] = {} if before is None else {keeper.index: keeper for keeper in before.routers}

        def keep_host(host: HostPlan) -> HostKeeper:
            return HostKeeper(
                host, tools=tools, threads_on=self._threads_on, on_change=on_change, on_outgrown=on_outgrown
            )

        self.hosts: list[HostKeeper] = [hosts.get(host.key) or keep_host(host) for host in plan.hosts]
        self.routers: list[RouterKeeper] = [
            routers.get(index)
            or RouterKeeper(plan.routers, index, tools=tools, new_address=self._new_address, on_change=on_change)
            for index in range(plan.routers.count)
        ]
        known = {*hosts.values(), *routers.values()}
        self.new = [keeper for keeper in self.keepers if keeper not in known]

    @property
    def keepers(self) -> list[Keeper]:
        """Of hosts and routers."""
        return [*self.hosts, *self.routers]

    def left_behind(self) -> tuple[list[HostKeeper], list[RouterKeeper]]:
        """What the fleet before has and this one has not."""
        if self._before is None:
            return [], []
        hosts = [keeper for keeper in self._before.hosts if keeper not in self.hosts]
        return hosts, [keeper for keeper in self._before.routers if keeper not in self.routers]

    async def bring_up(self) -> None:
        """Start what is new, all actors in parallel.

        Raises:
            PlacementError: If the cluster has no room for an actor in time.
            StartError: If an actor did not start; the message holds every actor's error.
        """
        self._chooser.plan(keeper.actor for keeper in self.new)
        await _all_or_nothing([keeper.place() for keeper in self.new])
        self._check_addresses()
        # Only now: with threads: auto a host's share of its node depends on who else is there.
        new_hosts = [keeper.start() for keeper in self.hosts if keeper in self.new]
        await _all_or_nothing([*new_hosts, *self._start_new_routers()])

    def take_over(self) -> None:
        """Have the keepers that the fleet before had too follow this plan."""
        for host, plan in zip(self.hosts, self.plan.hosts, strict=True):
            host.follow(plan, threads_on=self._threads_on)
        for router in self.routers:
            router.follow(self.plan.routers, new_address=self._new_address)
        self._before = None

    def has_twin(self, host: HostKeeper) -> bool:
        """Whether another host that is ready serves the same experts."""
        return any(
            other is not host and other.plan.twins == host.plan.twins != "" and other.life.state is ReplicaState.READY
            for other in self.hosts
        )

    def replicas(self) -> dict[tuple[str, int], tuple[Replica, ...]]:
        """What the routing table says of its hosts."""
        replicas: dict[tuple[str, int], tuple[Replica, ...]] = {}
        for keeper in self.hosts:
            for plan, replica in keeper.replicas():
                key = (plan.layer, plan.expert_id)
                replicas[key] = (*replicas.get(key, ()), replica)
        return replicas

    def addresses(self) -> list[str]:
        """Where clients find the routers that were started."""
        return [keeper.address for keeper in self.routers if keeper.address is not None]

    def progress(self) -> tuple[int, int]:
        """Number of actors that are ready, and of all."""
        keepers = self.keepers
        return sum(keeper.life.state is ReplicaState.READY for keeper in keepers), len(keepers)

    def describe(self) -> dict[str, Any]:
        """Hosts and routers with their states, as plain values."""
        return {
            "hosts": [keeper.describe() for keeper in self.hosts],
            "routers": [keeper.describe() for keeper in self.routers],
        }

    def _threads_on(self, location: Location) -> int:
        if self.plan.num_threads is not None:
            return self.plan.num_threads
        num_experts = sum(
            keeper.plan.num_at_once
            for keeper in self.hosts
            if keeper.location is not None and keeper.location.node == location.node
        )
        return max(1, location.num_cores // max(1, num_experts))

    def _start_new_routers(self) -> list[Awaitable[None]]:
        starts: list[Awaitable[None]] = []
        promised: dict[str, list[str]] = defaultdict(list)
        for keeper in self.routers:
            if keeper in self.new and keeper.location is not None:
                address = self._new_address(keeper.location, promised=promised[keeper.location.node])
                promised[keeper.location.node].append(address)
                starts.append(keeper.start(address))
        return starts

    def _check_addresses(self) -> None:
        places = [keeper.location for keeper in self.routers if keeper.location is not None]
        nodes, ips = [place.node for place in places], [place.ip for place in places]
        try:
            router_addresses(self.plan.routers.address, nodes, ips=ips)
        except ConfigError as exc:
            raise StartError(str(exc)) from exc

    def _new_address(self, location: Location, *, promised: Sequence[str] = ()) -> str:
        """For a router that comes to a place where others may be, or are about to be at promised addresses."""
        here = [k for k in self.routers if k.location is not None and k.location.node == location.node]
        taken = [k.bound for k in here if k.bound is not None and k.life.state is ReplicaState.READY]
        try:
            return next_address(self.plan.routers.address, ip=location.ip, taken=[*taken, *promised])
        except ConfigError as exc:
            raise StartError(str(exc)) from exc


def ready_handles(keepers: Iterable[Keeper]) -> list[Any]:
    """Handles of what serves; the others would not answer."""
    return [k.handle for k in keepers if k.life.state is ReplicaState.READY and k.handle is not None]


async def _all_or_nothing(starts: Iterable[Awaitable[None]]) -> None:
    results = await asyncio.gather(*starts, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if not errors:
        return
    for error in errors:
        if not isinstance(error, StartError):
            raise error
    # One line per distinct error: many hosts that fail alike should not hide the one that fails otherwise.
    text = "\n".join(dict.fromkeys(str(error) for error in errors))
    kind = PlacementError if all(isinstance(error, PlacementError) for error in errors) else StartError
    raise kind(text) from errors[0]
