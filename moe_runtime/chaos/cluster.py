"""The cluster under test: what runs where, watched all the time, and how long its parts are away."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.chaos.processes import is_marked
from moe_runtime.errors import MoERuntimeError

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from moe_runtime.launch.served import Runtime

_LOG = logging.getLogger(__name__)

_WATCH_EVERY_S = 0.2
_READY = "ready"


@dataclass(frozen=True)
class _Awaited:
    """A part that was lost, and how its return is told."""

    kind: str
    lost_at: float
    is_back: Callable[[dict[str, Any]], bool]


class Cluster:
    """A served runtime and the pids of its parts; signals go to processes of this run only."""

    def __init__(self, runtime: Runtime, *, run_id: str) -> None:
        """Look at the runtime for the first time."""
        self._runtime = runtime
        self._run_id = run_id
        self._awaited: list[_Awaited] = []
        self.description = runtime.describe()
        self.seen_pids: set[int] = set()
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self._note_pids()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the routers."""
        return self._runtime.addresses

    @property
    def controller_pid(self) -> int:
        """Of the controller, when it was last seen."""
        pid: int = self.description["controller_pid"]
        return pid

    def hosts(self) -> list[dict[str, Any]]:
        """The expert hosts as the controller describes them."""
        hosts: list[dict[str, Any]] = self.description["hosts"]
        return hosts

    def routers(self) -> list[dict[str, Any]]:
        """The routers as the controller describes them."""
        routers: list[dict[str, Any]] = self.description["routers"]
        return routers

    @property
    def is_whole(self) -> bool:
        """Whether every part was ready when it was last seen, and none is waited for."""
        parts = [*self.hosts(), *self.routers()]
        return not self._awaited and all(part["state"] == _READY for part in parts)

    async def watch(self) -> None:
        """Keep the description up to date until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_WATCH_EVERY_S)

    async def look(self) -> None:
        """Ask the controller once; what it says stays as it was where it does not answer."""
        try:
            self.description = await asyncio.to_thread(self._runtime.describe)
        except MoERuntimeError as exc:
            _LOG.info("the controller does not describe the runtime just now: %s", exc)
            return
        self._note_pids()
        now = time.monotonic()
        for awaited in [each for each in self._awaited if each.is_back(self.description)]:
            self._awaited.remove(awaited)
            self.recovery_s[awaited.kind].append(now - awaited.lost_at)

    def send_signal(self, pid: int | None, number: signal.Signals) -> bool:
        """Whether a process of this run got a signal; others never do."""
        if pid is None or not is_marked(pid, self._run_id):
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def await_back(self, kind: str, is_back: Callable[[dict[str, Any]], bool]) -> None:
        """Measure from now on how long a part is away."""
        self._awaited.append(_Awaited(kind, time.monotonic(), is_back))

    def _note_pids(self) -> None:
        parts = [*self.hosts(), *self.routers()]
        self.seen_pids.update(part["pid"] for part in parts if part["pid"] is not None)
        self.seen_pids.add(self.controller_pid)


def host_is_back(host_id: str, old_pid: int) -> Callable[[dict[str, Any]], bool]:
    """Tells whether another process serves an expert host."""

    def is_back(description: dict[str, Any]) -> bool:
        return any(
            host["host_id"] == host_id and host["state"] == _READY and host["pid"] != old_pid
            for host in description["hosts"]
        )

    return is_back


def router_is_back(index: int, old_pid: int) -> Callable[[dict[str, Any]], bool]:
    """Tells whether another process serves a router's address."""

    def is_back(description: dict[str, Any]) -> bool:
        return any(
            router["index"] == index and router["state"] == _READY and router["pid"] != old_pid
            for router in description["routers"]
        )

    return is_back


def controller_is_back(old_pid: int) -> Callable[[dict[str, Any]], bool]:
    """Tells whether another process is the controller."""
    return lambda description: description["controller_pid"] != old_pid
