"""The router actor: a router's process behind a few calls. Clients never call it: they speak gRPC to the process."""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING, Any

from moe_runtime.ray_backend import whereabouts
from moe_runtime.ray_backend.node_watch import watch_own_node
from moe_runtime.ray_backend.plan import Failure, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.plan import Location, RouterFactory, RouterProcess, RouterReport


class RouterActor:
    """Runs one router. Ray restarts its process for ever; the controller then starts it again, with its table."""

    def __init__(
        self,
        factory: bytes,
        *,
        locate: Callable[[], Location] = whereabouts.locate,
        watch_node: Callable[[], None] = watch_own_node,
    ) -> None:
        """Start nothing yet.

        Args:
            factory: The pickled factory of the router's process.
            locate: Tells where it runs.
            watch_node: Called once it serves; ends this process when its node is given up: clients that still reach
                it would be served by the experts of a lost node only.
        """
        self._factory = factory
        self._locate = locate
        self._watch_node = watch_node
        self._process: RouterProcess | None = None
        self._report: RouterReport | None = None
        self._starting = asyncio.Lock()
        self._ended = asyncio.Event()
        self._snapshot: Snapshot | None = None

    async def locate(self) -> Location:
        """Where this process runs."""
        return self._locate()

    async def start(self, address: str) -> RouterReport | Failure:
        """Bind and serve; a router that serves already just reports."""
        async with self._starting:
            if self._report is None:
                return await asyncio.to_thread(self._start, address)
            return self._report

    async def ping(self) -> None:
        """Answer."""

    async def keep(self, snapshot: Snapshot) -> None:
        """Route by the snapshot's table from now on, unless a newer one is here, or hosts do not know this router."""
        if self._snapshot is None or snapshot.table.version >= self._snapshot.table.version:
            self._snapshot = snapshot
            self._hand_on_table()

    async def kept(self) -> Snapshot | None:
        """The newest snapshot."""
        return self._snapshot

    async def describe(self) -> dict[str, Any]:
        """Layers, experts and replicas, as plain values."""
        return {} if self._process is None else self._process.describe()

    async def status(self) -> dict[str, Any]:
        """Counters and load, as plain values."""
        return {} if self._process is None else self._process.status()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all were answered."""
        return self._process is None or await asyncio.to_thread(self._process.drain, timeout_s)

    async def wait(self) -> str:
        """Stay pending until the router no longer serves; a caller learns of the process's death at once."""
        await self._ended.wait()
        return "it was stopped"

    async def stop(self) -> None:
        """Stop serving."""
        if self._process is not None:
            await asyncio.to_thread(self._process.close)
        self._ended.set()

    def _start(self, address: str) -> RouterReport | Failure:
        try:
            factory: RouterFactory = pickle.loads(self._factory)
            process = factory(self._locate())
            report = process.start(address)
        except Exception as exc:
            # As a value: the one who started it wants the error's text, not a remote traceback.
            return Failure(type(exc).__name__, str(exc))
        self._process, self._report = process, report
        self._watch_node()
        self._hand_on_table()
        return report

    def _hand_on_table(self) -> None:
        if self._process is None or self._report is None or self._snapshot is None:
            return
        # A snapshot that was meant for this router's predecessor waits for the one that knows its own key.
        if self._snapshot.is_for(self._report.public_key):
            self._process.set_table(self._snapshot.table)
