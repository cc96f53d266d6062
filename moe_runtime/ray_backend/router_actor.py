"""The router actor: a router's process behind a few calls. Clients never call it: they speak gRPC to the process."""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING, Any

from moe_runtime.ray_backend.plan import Failure, Snapshot
from moe_runtime.ray_backend.whereabouts import locate

if TYPE_CHECKING:
    from moe_runtime.ray_backend.plan import Location, RouterFactory, RouterProcess


class RouterActor:
    """Runs one router. Ray restarts its process for ever; the controller then starts it again, with its table."""

    def __init__(self, factory: bytes) -> None:
        """Keep the pickled factory of the router's process."""
        self._factory = factory
        self._process: RouterProcess | None = None
        self._bound: str | None = None
        self._starting = asyncio.Lock()
        self._ended = asyncio.Event()
        self._snapshot: Snapshot | None = None

    async def locate(self) -> Location:
        """Where this process runs."""
        return locate()

    async def start(self, address: str) -> str | Failure:
        """Bind and serve; a router that serves already answers with its bound address."""
        async with self._starting:
            if self._bound is not None:
                return self._bound
            bound = await asyncio.to_thread(self._start, address)
            if not isinstance(bound, Failure):
                self._bound = bound
            return bound

    async def ping(self) -> None:
        """Answer."""

    async def keep(self, snapshot: Snapshot) -> None:
        """Route by the snapshot's table from now on, unless a newer one is here."""
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

    def _start(self, address: str) -> str | Failure:
        try:
            factory: RouterFactory = pickle.loads(self._factory)
            process = factory(locate())
            bound = process.start(address)
        except Exception as exc:
            # As a value: the one who started it wants the error's text, not a remote traceback.
            return Failure(type(exc).__name__, str(exc))
        self._process = process
        self._hand_on_table()
        return bound

    def _hand_on_table(self) -> None:
        if self._process is not None and self._snapshot is not None:
            self._process.set_table(self._snapshot.table)
