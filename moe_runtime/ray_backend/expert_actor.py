"""The expert actor: a host's process behind a few calls. Tokens never pass through it."""

from __future__ import annotations

import asyncio
import os
import pickle
from typing import TYPE_CHECKING

from moe_runtime.errors import MoERuntimeError, StartError
from moe_runtime.ray_backend.plan import Failure, Snapshot
from moe_runtime.ray_backend.whereabouts import locate

if TYPE_CHECKING:
    from collections.abc import Collection

    from moe_runtime.ray_backend.plan import HostHealth, HostReport, Location
    from moe_runtime.ray_backend.processes import HostFactory, HostProcess


class ExpertActor:
    """Runs one expert host. Its calls are coroutines: they answer while experts load and compute.

    The constructor does nothing that can fail, because Ray reports a failed constructor badly.
    """

    def __init__(self, factory: bytes) -> None:
        """Keep the pickled factory of the host's process."""
        self._factory = factory
        self._process: HostProcess | None = None
        self._outcome: HostReport | Failure | None = None
        self._starting = asyncio.Lock()
        self._ended = asyncio.Event()
        self._reason = ""
        self._snapshot: Snapshot | None = None
        self._watch: asyncio.Task[None] | None = None

    async def locate(self) -> Location:
        """Where this process runs."""
        return locate()

    async def start(self, num_threads: int) -> HostReport | Failure:
        """Start the host, once; every later call gets the first one's outcome."""
        async with self._starting:
            if self._outcome is None:
                self._outcome = await asyncio.to_thread(self._start, num_threads)
                if not isinstance(self._outcome, Failure):
                    self._watch = asyncio.create_task(self._watch_process())
            return self._outcome

    async def admit(self, public_keys: Collection[str]) -> Failure | None:
        """Let routers with these keys connect from other nodes, and no others; None, or why it could not."""
        try:
            if self._process is None:
                raise StartError("expected a started host to let routers in")
            self._process.admit(public_keys)
        except MoERuntimeError as exc:
            return Failure(type(exc).__name__, str(exc))
        return None

    async def ping(self) -> HostHealth | None:
        """Answer, and say how the host is; None before it was started."""
        return None if self._process is None else self._process.health()

    async def keep(self, snapshot: Snapshot) -> None:
        """Keep a snapshot for a controller that comes back, unless a newer one is here."""
        if self._snapshot is None or snapshot.table.version >= self._snapshot.table.version:
            self._snapshot = snapshot

    async def kept(self) -> Snapshot | None:
        """The newest snapshot."""
        return self._snapshot

    async def wait(self) -> str:
        """Stay pending until the host no longer serves; a caller learns of the process's death at once."""
        await self._ended.wait()
        return self._reason

    async def stop(self) -> None:
        """Stop serving, and clean up."""
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)

    def _start(self, num_threads: int) -> HostReport | Failure:
        # Before the factory brings torch in, whose OpenMP reads this once.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        try:
            factory: HostFactory = pickle.loads(self._factory)  # nosec B301  # from the controller, by Ray
            self._process = factory(locate(), num_threads=num_threads)
            return self._process.start()
        except MoERuntimeError as exc:
            return Failure(type(exc).__name__, str(exc))
        except Exception as exc:
            # An expert is anybody's code: whatever it raises has to reach the one who started it.
            return Failure(type(exc).__name__, str(exc))

    async def _watch_process(self) -> None:
        if self._process is not None:
            self._reason = await asyncio.to_thread(self._process.join)
        self._ended.set()
