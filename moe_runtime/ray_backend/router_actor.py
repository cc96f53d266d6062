"""The router actor: a router's process behind a few calls. Clients never call it: they speak gRPC to the process."""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import TYPE_CHECKING, Any

from moe_runtime.ray_backend import whereabouts
from moe_runtime.ray_backend.node_watch import watch_own_node
from moe_runtime.ray_backend.plan import Failure, Snapshot
from moe_runtime.service.online_bias import AskedCounts
from moe_runtime.transport.incarnation import mint_incarnation

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from moe_runtime.ray_backend.plan import Location, RouterReport, RoutersPlan
    from moe_runtime.ray_backend.processes import RouterFactory, RouterProcess

_LOG = logging.getLogger(__name__)


class RouterActor:
    """Runs one router. Ray restarts its process for ever; the controller then starts it again, with its table."""

    def __init__(
        self,
        *,
        locate: Callable[[], Location] = whereabouts.locate,
        watch_node: Callable[[], None] = watch_own_node,
    ) -> None:
        """Start nothing yet.

        Args:
            locate: Tells where it runs.
            watch_node: Called once it serves; ends this process when its node is given up: clients that still reach
                it would be served by the experts of a lost node only.
        """
        self._locate = locate
        self._watch_node = watch_node
        self._incarnation = mint_incarnation()
        self._process: RouterProcess | None = None
        self._report: RouterReport | None = None
        #: Of what it serves, and of what it could.
        self._revision = ""
        self._prepared: tuple[str, Any] | None = None
        self._changing = asyncio.Lock()
        self._preparing = asyncio.Lock()
        self._ended = asyncio.Event()
        self._snapshot: Snapshot | None = None

    async def locate(self) -> Location:
        """Where this process runs."""
        return self._locate()

    async def start(self, address: str, plan: RoutersPlan) -> RouterReport | Failure:
        """Bind and serve; a router that serves already just reports."""
        async with self._changing:
            if self._report is None:
                outcome = await asyncio.to_thread(self._start, address, plan)
                if isinstance(outcome, Failure):
                    return outcome
                self._report, self._revision = outcome, plan.revision
            report = self._report
        await self._follow()
        return report

    async def prepare(self, plan: RoutersPlan) -> Failure | None:
        """Build what a newer plan's routers serve, so that the change to it takes no time; None, or why it cannot."""
        async with self._preparing:
            prepared = None if self._prepared is None else self._prepared[0]
            if plan.revision in (self._revision, prepared):
                return None
            outcome = await asyncio.to_thread(_prepare, plan)
            if isinstance(outcome, Failure):
                return outcome
            self._prepared = (plan.revision, outcome)
        return None

    async def ping(self) -> str | None:
        """Answer: what of the router stands still, in words; None where nothing does."""
        return None if self._process is None else self._process.standstill()

    async def keep(self, snapshot: Snapshot) -> None:
        """Serve by the snapshot from now on, unless a newer one is here, or hosts do not know this router."""
        if self._snapshot is None or snapshot.table.version >= self._snapshot.table.version:
            self._snapshot = snapshot
            await self._follow()

    async def kept(self) -> Snapshot | None:
        """The newest snapshot."""
        return self._snapshot

    async def oldest_table_version(self) -> int | None:
        """The oldest version of the table that a request may still use; None if that is not known just now."""
        if self._process is None:
            return None
        try:
            return await asyncio.to_thread(self._process.oldest_table_version)
        except TimeoutError:
            return None

    async def describe(self) -> dict[str, Any]:
        """Layers, experts and replicas, as plain values."""
        return {} if self._process is None else self._process.describe()

    async def status(self) -> dict[str, Any]:
        """Counters and load, as plain values."""
        return {} if self._process is None else self._process.status()

    async def asked(self, layers: Collection[str]) -> AskedCounts | None:
        """What this process was asked for in these layers; None before it serves."""
        return None if self._process is None else AskedCounts(self._incarnation, self._process.asked(layers))

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

    def _start(self, address: str, plan: RoutersPlan) -> RouterReport | Failure:
        try:
            factory: RouterFactory = pickle.loads(plan.factory)  # nosec B301  # from the controller, by Ray
            process = factory(self._locate())
            report = process.start(address)
        except Exception as exc:
            # As a value: the one who started it wants the error's text, not a remote traceback.
            return Failure(type(exc).__name__, str(exc))
        self._process = process
        self._watch_node()
        return report

    async def _follow(self) -> None:
        """Bring the process up to the newest snapshot: its table, and what it serves where that has changed."""
        async with self._changing:
            snapshot = self._snapshot
            if self._process is None or self._report is None or snapshot is None:
                return
            # A snapshot that was meant for this router's predecessor waits for the one that knows its own key.
            if not snapshot.is_for(self._report.public_key):
                return
            routers = None if snapshot.plan is None else snapshot.plan.routers
            if routers is None or routers.revision == self._revision:
                self._process.set_table(snapshot.table)
                return
            failure = await self.prepare(routers)
            if failure is not None or self._prepared is None:
                # Not the table alone: its experts may have other places than these layers give them.
                _LOG.warning("the router serves on as it did: %s", failure)
                return
            (self._revision, setup), self._prepared = self._prepared, None
            self._process.replace_setup(setup, snapshot.table)


def _prepare(plan: RoutersPlan) -> Any:
    try:
        factory: RouterFactory = pickle.loads(plan.factory)  # nosec B301  # from the controller, by Ray
        return factory.prepare()
    except Exception as exc:
        # As a value: the one who asked wants the error's text, not a remote traceback.
        return Failure(type(exc).__name__, str(exc))
