"""A clock that tests move by hand, and actors that live, hang and die when tests say so."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from moe_runtime.errors import StartError
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
from moe_runtime.ray_backend.spawner import NodeRefusedError
from moe_runtime.service.online_bias import AskedCounts
from moe_runtime.service.ports import Endpoint

_pids = itertools.count(1000)


async def settle() -> None:
    """Let every task run until it waits for something that only the test can bring."""
    for _ in range(60):
        await asyncio.sleep(0)


class FakeClock:
    """Time that passes only in ``advance``."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + seconds, woken))
        await woken

    async def freeze(self, seconds: float) -> None:
        """Pass so much time at once: whoever sleeps meanwhile wakes at its end."""
        await settle()
        self._now += seconds
        await self.advance(0.0)

    async def advance(self, seconds: float) -> None:
        """Pass so much time, waking sleepers one by one at their times."""
        until = self._now + seconds
        await settle()
        while due := [s for s in self._sleepers if s[0] <= until and not s[1].done()]:
            first = min(due, key=lambda sleeper: sleeper[0])
            self._sleepers.remove(first)
            self._now = max(self._now, first[0])
            first[1].set_result(None)
            await settle()
        self._now = until


@dataclass
class Behaviour:
    """How one spawned actor behaves; the default one does well."""

    node: str = "n1"
    error: str | None = None
    is_placed: bool = True
    is_refused: bool = False
    has_key: bool = True
    #: Whether its start takes until the test says so.
    is_slow: bool = False


@dataclass
class FakeActor:
    """An actor without a process."""

    name: str
    behaviour: Behaviour
    answers_pings: bool = True
    answers_admissions: bool = True
    answers_snapshots: bool = True
    snapshots: list[Snapshot] = field(default_factory=list)
    starts: list[Any] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    introductions: list[str] = field(default_factory=list)
    admitted: frozenset[str] = frozenset()
    pid: int = field(default_factory=lambda: next(_pids))

    def __post_init__(self) -> None:
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._may_start = asyncio.Event()
        if not self.behaviour.is_slow:
            self._may_start.set()

    def finish_start(self) -> None:
        """Let the start of a slow one come to its end."""
        self._may_start.set()

    def die(self, reason: str = "killed") -> None:
        if not self.death.done():
            self.death.set_result(reason)

    async def locate(self) -> Location:
        if self.behaviour.is_refused:
            raise NodeRefusedError("ActorUnschedulableError: the node is gone")
        if not self.behaviour.is_placed:
            await asyncio.shield(self.death)
        self._alive()
        return Location(self.behaviour.node, "10.0.0.1", num_cores=8, pid=self.pid)

    async def _answer(self) -> None:
        self._alive()
        if not self.answers_pings:
            await asyncio.get_running_loop().create_future()

    async def keep(self, snapshot: Snapshot) -> bool:
        if not self.answers_snapshots:
            await asyncio.get_running_loop().create_future()
        if not self.death.done():
            self.snapshots.append(snapshot)
        return not self.death.done()

    async def kept(self) -> Snapshot | None:
        return self.snapshots[-1] if self.snapshots else None

    async def wait(self) -> str:
        return await asyncio.shield(self.death)

    async def stop(self) -> None:
        self.log.append(f"stop {self.name}")

    async def kill(self) -> None:
        self.log.append(f"kill {self.name}")
        self.die()

    def _alive(self) -> None:
        if self.death.done():
            raise StartError(f"the actor died: {self.death.result()}")
        if self.behaviour.error is not None and self.starts:
            raise StartError(self.behaviour.error)


@dataclass
class FakeHost(FakeActor):
    health: HostHealth | None = None

    async def ping(self) -> HostHealth | None:
        await self._answer()
        return self.health

    async def start(self, num_threads: int) -> HostReport:
        self.starts.append(num_threads)
        self._alive()
        await self._may_start.wait()
        endpoint = Endpoint(incarnation=self.pid, node=self.behaviour.node)
        return HostReport(endpoint, "cpu", num_threads, {})

    async def admit(self, public_keys: Collection[str]) -> None:
        self._alive()
        if not self.answers_admissions:
            await asyncio.get_running_loop().create_future()
        self.admitted = frozenset(public_keys)
        self.introductions.append(f"{self.name} admits {', '.join(sorted(public_keys))}")


@dataclass
class FakeRouter(FakeActor):
    refuses_to_prepare: str | None = None
    prepared: list[str] = field(default_factory=list)
    served: str = ""
    #: A version that a request in flight still uses.
    holds: int | None = None
    #: Assignments that it was asked for, by layer and expert.
    loads: dict[str, dict[str, int]] = field(default_factory=dict)
    tells_loads: bool = True

    standstill: str | None = None
    outlives_restart: bool = False

    async def ping(self) -> str | None:
        await self._answer()
        return self.standstill

    async def restart(self) -> None:
        self.log.append(f"restart {self.name}")
        if not self.outlives_restart:
            self.die("restarted")

    @property
    def public_key(self) -> str | None:
        return f"key-{self.pid}" if self.behaviour.has_key else None

    async def start(self, address: str, plan: RoutersPlan) -> RouterReport:
        self.starts.append(address)
        self._alive()
        self.served = plan.revision
        return RouterReport(address.replace(":0", ":7777"), self.public_key)

    async def keep(self, snapshot: Snapshot) -> bool:
        self.introductions.append(f"{self.name} gets version {snapshot.table.version}")
        return await super().keep(snapshot)

    async def prepare(self, plan: RoutersPlan) -> None:
        self._alive()
        if self.refuses_to_prepare is not None:
            raise StartError(self.refuses_to_prepare)
        self.prepared.append(plan.revision)

    async def oldest_table_version(self) -> int | None:
        self._alive()
        newest = self.snapshots[-1].table.version if self.snapshots else None
        return newest if self.holds is None else self.holds

    async def describe(self) -> dict[str, Any] | None:
        return {"layers": {"l": {}}}

    async def status(self) -> dict[str, Any] | None:
        return {}

    async def asked(self, layers: Collection[str]) -> AskedCounts | None:
        if not self.tells_loads:
            await asyncio.get_running_loop().create_future()
        if self.death.done():
            return None
        return AskedCounts(self.pid, {name: dict(self.loads.get(name, {})) for name in layers})

    async def drain(self, timeout_s: float) -> bool:
        self.log.append(f"drain {self.name}")
        return True


class FakeSpawner:
    """Spawns fake actors; ``behaviours[name]`` is a queue of what the next ones of that name are like."""

    def __init__(self) -> None:
        self.behaviours: dict[str, deque[Behaviour]] = defaultdict(deque)
        self.spawned: dict[str, list[Any]] = defaultdict(list)
        self.cluster: list[NodeShape] = []
        self.log: list[str] = []
        self.introductions: list[str] = []
        self.num_sweeps = 0
        self.cleaned_up: list[Endpoint] = []

    def find_host(self, plan: HostPlan) -> Any:
        return self._living(plan.key)

    def others(self, plan: RuntimePlan | None) -> tuple[list[Any], list[Any]]:
        known = set() if plan is None else {host.key for host in plan.hosts}
        known |= set() if plan is None else {f"router-{index}" for index in range(plan.routers.count)}
        living = [actor for name in self.spawned if name not in known and (actor := self._living(name))]
        return (
            [actor for actor in living if isinstance(actor, FakeHost)],
            [actor for actor in living if isinstance(actor, FakeRouter)],
        )

    def living(self) -> set[str]:
        """The names of the actors that live."""
        return {name for name in self.spawned if self._living(name)}

    def nodes(self) -> list[NodeShape]:
        return self.cluster

    def spawn_host(self, plan: HostPlan, *, node_id: str | None) -> Any:
        return self._spawn(FakeHost, plan.key, node_id)

    def find_router(self, index: int) -> Any:
        return self._living(f"router-{index}")

    def spawn_router(self, plan: RoutersPlan, index: int, *, node_id: str | None) -> Any:
        return self._spawn(FakeRouter, f"router-{index}", node_id)

    def explain(self, demand: Demand) -> str:
        return f"asks for GPU {demand.num_gpus:g}; the cluster has GPU 0 free of 0"

    def sweep(self) -> None:
        self.num_sweeps += 1

    def clean_up(self, endpoint: Endpoint) -> None:
        self.cleaned_up.append(endpoint)

    def last(self, name: str) -> Any:
        return self.spawned[name][-1]

    def _living(self, name: str) -> Any:
        return next((actor for actor in self.spawned[name] if not actor.death.done()), None)

    def _spawn(self, actor_class: type, name: str, node_id: str | None) -> Any:
        if self._living(name) is not None:
            raise StartError(f"an actor named {name} lives")
        queue = self.behaviours[name]
        behaviour = queue.popleft() if queue else Behaviour()
        if node_id is not None:
            behaviour = replace(behaviour, node=node_id)
        actor = actor_class(name, behaviour, log=self.log, introductions=self.introductions)
        self.spawned[name].append(actor)
        return actor
