"""The controller actor: the controller in a process of its own, which Ray restarts for ever."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from typing import TYPE_CHECKING, Any

import ray

from moe_runtime.errors import MoERuntimeError, StartError, UnavailableError
from moe_runtime.logs import LogIdentity, install
from moe_runtime.ray_backend.controller import Controller
from moe_runtime.ray_backend.deployment import DeploymentStanding, Phase
from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.plan import Failure
from moe_runtime.ray_backend.ray_spawner import RaySpawner, find_actor
from moe_runtime.ray_backend.spawner import LoopClock
from moe_runtime.ray_backend.whereabouts import locate

if TYPE_CHECKING:
    from moe_runtime.ray_backend.caller_notes import CallerNews, CallerNote
    from moe_runtime.ray_backend.changes import Restarted, RestartTerms
    from moe_runtime.ray_backend.plan import RoutersPlan, RuntimePlan
    from moe_runtime.ray_backend.roll import Upgraded
    from moe_runtime.service.routing_table import RoutingTable

_LOG = logging.getLogger(__name__)

_MAX_KEPT_WARNINGS = 100


class _WarningKeeper(logging.Handler):
    """Keeps the newest warnings of this process, whose output nobody sees, for whoever renews the lease."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: deque[str] = deque(maxlen=_MAX_KEPT_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def take(self) -> list[str]:
        """The messages since the last time."""
        messages = list(self._messages)
        self._messages.clear()
        return messages


class ControllerActor:
    """Runs one runtime's controller; a restarted one resumes by itself, because nobody would tell it to."""

    async def __init__(self, plan: RuntimePlan) -> None:  # type: ignore[misc]  # Ray awaits it, in the loop
        """Make the controller of a plan; the first one waits for ``start``."""
        self._name = plan.name
        self._phase = Phase.NEW
        install(plan.logging, LogIdentity("controller", plan.name, locate().node))
        self._warnings = _WarningKeeper()
        logging.getLogger("moe_runtime").addHandler(self._warnings)
        self._controller = Controller(plan, spawner=RaySpawner(plan.name), clock=LoopClock())
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._resuming = asyncio.create_task(self._resume()) if restarted else None
        self._ending = asyncio.create_task(self._end())

    async def start(self) -> Failure | None:
        """Bring everything up; None, or why it did not."""
        self._phase = Phase.STARTING
        try:
            await self._controller.start()
        except StartError as exc:
            self._phase = Phase.ENDING
            return Failure(type(exc).__name__, str(exc))
        self._phase = Phase.SERVING
        return None

    async def standing(self) -> DeploymentStanding:
        """From which deployment it is, and how far: whoever started it may be gone."""
        await self._resumed()
        return DeploymentStanding(self._controller.plan.deployment, self._phase)

    async def renew(self) -> list[str]:
        """Extend the lease; what the controller has warned of since the last time."""
        self._controller.renew()
        return self._warnings.take()

    async def progress(self) -> list[int]:
        """Number of actors that are ready, and of all."""
        return list(self._controller.progress())

    async def addresses(self) -> list[str]:
        """Where clients find the routers."""
        await self._resumed()
        return self._controller.addresses()

    async def describe(self) -> dict[str, Any]:
        """Layers, hosts and routers with their states, as plain values."""
        await self._resumed()
        return {**await self._controller.describe(), "controller_pid": os.getpid()}

    async def routers_plan(self) -> RoutersPlan:
        """What a program needs to route for itself."""
        await self._resumed()
        return self._controller.plan.routers

    async def table(self) -> RoutingTable:
        """The newest routing table."""
        await self._resumed()
        return self._controller.table

    async def caller_left(self, caller: str) -> None:
        """A program routes no longer."""
        self._controller.caller_left(caller)

    async def caller_news(self, note: CallerNote, timeout_s: float) -> CallerNews | Failure | None:
        """What a program that routes for itself does not know yet; None if there is nothing in time."""
        await self._resumed()
        try:
            return await self._controller.caller_news(note, timeout_s=timeout_s)
        except UnavailableError as exc:
            return Failure(type(exc).__name__, str(exc))

    async def source(self) -> bytes:
        """What the plan was made from."""
        await self._resumed()
        return self._controller.plan.source

    async def upgrade(self, plan: RuntimePlan, instead_of: bytes | None = None) -> Upgraded | Failure:
        """Roll to another plan; what was done, or why it was not."""
        await self._resumed()
        try:
            return await self._controller.upgrade(plan, instead_of=instead_of)
        except MoERuntimeError as exc:
            return Failure(type(exc).__name__, str(exc))

    async def restart_terms(self) -> RestartTerms:
        """Of a restart that begins now."""
        await self._resumed()
        return self._controller.restart_terms()

    async def restart(self, generation: int, routers: bool) -> Restarted | Failure:
        """Give actors other processes; what was done, or why it was not."""
        await self._resumed()
        try:
            return await self._controller.restart(generation=generation, routers=routers)
        except MoERuntimeError as exc:
            return Failure(type(exc).__name__, str(exc))

    async def close(self, drain_timeout_s: float) -> bool:
        """Drain, then end every actor but this one; whether every request was answered."""
        await self._resumed()
        self._phase = Phase.ENDING
        return await self._controller.close(drain_timeout_s=drain_timeout_s)

    async def _resumed(self) -> None:
        """Wait until a restarted controller knows its actors again."""
        if self._resuming is not None:
            await asyncio.shield(self._resuming)

    async def _resume(self) -> None:
        try:
            await self._controller.resume()
            self._phase = Phase.SERVING
        except Exception:
            _LOG.exception("runtime %s: the controller could not resume", self._name)
            raise

    async def _end(self) -> None:
        """Follow the runtime's actors once they were torn down."""
        await self._controller.wait_ended()
        # Whoever called `close` still gets the answer.
        await asyncio.sleep(1.0)
        myself = find_actor(controller_name(self._name))
        if myself is not None:
            ray.kill(myself, no_restart=True)
