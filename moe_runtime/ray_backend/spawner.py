"""The ports of the controller: what it asks of whatever runs actors, and of the time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moe_runtime.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Sequence

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

ResultT = TypeVar("ResultT")


class NodeRefusedError(StartError):
    """The node that an actor was meant for is gone, or has no room any more."""


class AwayError(StartError):
    """The actor's process has ended, or cannot be reached; Ray may bring it back."""


class AsyncClock(Protocol):
    """Tells the time and waits; tests bring their own."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds; at once where they are not positive."""
        ...


class LoopClock:
    """The machine's monotonic clock and asyncio's timers."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds; at once where they are not positive."""
        await asyncio.sleep(seconds)


async def within(clock: AsyncClock, timeout_s: float, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The work's result, if it comes in time.

    Raises:
        TimeoutError: If it does not; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    timer = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise TimeoutError(f"nothing within {timeout_s:g} s")
    finally:
        task.cancel()
        timer.cancel()


async def ends_within(clock: AsyncClock, timeout_s: float, task: asyncio.Future[Any]) -> bool:
    """Whether a task has ended by then; it goes on either way."""
    timer = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        timer.cancel()


class ActorHandle(Protocol):
    """An actor of the runtime, expert or router. Calls wait for its placement; callers bound them."""

    async def locate(self) -> Location:
        """Where it runs; answers as soon as it is placed.

        Raises:
            NodeRefusedError: If the node that it was created for does not take it.
            StartError: If it died.
        """
        ...

    async def keep(self, snapshot: Snapshot) -> bool:
        """Hand it the newest snapshot, table included; False if it is gone. An older one is ignored."""
        ...

    async def kept(self) -> Snapshot | None:
        """The newest snapshot that it was given; None if it has none or is gone."""
        ...

    async def wait(self) -> str:
        """Return when it no longer serves or is dead, with the reason; never raises."""
        ...

    async def stop(self) -> None:
        """Make it stop serving; returns when it has, or is gone."""
        ...

    async def kill(self) -> None:
        """End its process at once, for good; returns without waiting for that."""
        ...


class HostHandle(ActorHandle, Protocol):
    """An expert actor."""

    async def ping(self) -> HostHealth | None:
        """How it is, as soon as it answers; None while it has not started.

        Raises:
            StartError: If it died.
        """
        ...

    async def start(self, num_threads: int) -> HostReport:
        """Start it; a host that is started already just reports.

        Raises:
            StartError: If it cannot, with its error's text, or died.
        """
        ...

    async def admit(self, public_keys: Collection[str]) -> None:
        """Have a started host let routers with these keys connect from other nodes, and no others.

        Raises:
            StartError: If it cannot, with its error's text, or died.
        """
        ...


class RouterHandle(ActorHandle, Protocol):
    """A router actor."""

    async def ping(self) -> str | None:
        """What of it stands still, in words, as soon as it answers; None where nothing does.

        Raises:
            StartError: If it died.
        """
        ...

    async def restart(self) -> None:
        """End its process at once, for another in the same place; returns without waiting for that."""
        ...

    async def start(self, address: str, plan: RoutersPlan) -> RouterReport:
        """Start it, and get its bound address and its key; a router that is started already just reports.

        Raises:
            StartError: If it cannot, with its error's text, or died.
        """
        ...

    async def prepare(self, plan: RoutersPlan) -> None:
        """Have it build what a plan's routers serve, while it serves on; a snapshot of that plan then takes no time.

        Raises:
            StartError: If it cannot, with its error's text, or died.
        """
        ...

    async def oldest_table_version(self) -> int | None:
        """The oldest version of the table that a request may still use; None if it does not know, or is gone."""
        ...

    async def describe(self) -> dict[str, Any] | None:
        """Its layers, experts and replicas; None if it is gone."""
        ...

    async def status(self) -> dict[str, Any] | None:
        """Its counters and load; None if it is gone."""
        ...

    async def asked(self, layers: Collection[str]) -> AskedCounts | None:
        """What its process was asked for in these layers; None if it has not started, or is gone."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all were answered."""
        ...


class Spawner(Protocol):
    """Creates and finds the actors of one runtime.

    Guarantees: nothing here waits for a placement; at most one living actor per key of a host and router index.
    """

    def nodes(self) -> Sequence[NodeShape]:
        """The nodes that are alive, and what is free on them."""
        ...

    def find_host(self, plan: HostPlan) -> HostHandle | None:
        """The living actor of a host, of this revision, if there is one."""
        ...

    def others(self, plan: RuntimePlan | None) -> tuple[Sequence[HostHandle], Sequence[RouterHandle]]:
        """Living hosts and routers of the runtime that a plan does not name; all of them where there is no plan."""
        ...

    def spawn_host(self, plan: HostPlan, *, node_id: str | None) -> HostHandle:
        """A new actor, perhaps not placed yet: on that node or nowhere; wherever Ray finds room when None.

        Raises:
            StartError: If one of that name lives, or the demand is malformed.
        """
        ...

    def find_router(self, index: int) -> RouterHandle | None:
        """The living actor of a router, restarting ones included, if there is one."""
        ...

    def spawn_router(self, plan: RoutersPlan, index: int, *, node_id: str | None) -> RouterHandle:
        """A new actor, perhaps not placed yet: on that node or nowhere; wherever Ray finds room when None.

        Raises:
            StartError: If one of that name lives.
        """
        ...

    def explain(self, demand: Demand) -> str:
        """The demand in words, and what the cluster has."""
        ...

    def sweep(self) -> None:
        """Remove what dead hosts of this node left behind."""
        ...

    def clean_up(self, endpoint: Endpoint) -> None:
        """Remove what one host that is dead, or was killed, left behind, if it was on this node."""
        ...
