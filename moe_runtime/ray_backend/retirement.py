"""Ends actors that a runtime's plan does not have any more, each when no request needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from moe_runtime.ray_backend.board import CALL_TIMEOUT_S
from moe_runtime.ray_backend.spawner import within
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from moe_runtime.ray_backend.board import Board
    from moe_runtime.ray_backend.host_keeper import HostKeeper
    from moe_runtime.ray_backend.router_keeper import RouterKeeper
    from moe_runtime.ray_backend.spawner import AsyncClock, HostHandle, RouterHandle

_LOG = logging.getLogger(__name__)

_FIRST_POLL_S = 0.05
_LONGEST_POLL_S = 1.0


class StrayHost:
    """An expert host that no keeper knows: left by an upgrade whose controller died."""

    def __init__(self, handle: HostHandle, clock: AsyncClock) -> None:
        """Do nothing yet."""
        self._handle = handle
        self._clock = clock

    async def end(self) -> None:
        """Stop it and end its actor."""
        await _end(self._handle, self._clock)


class StrayRouter:
    """A router that no keeper knows: left by an upgrade whose controller died."""

    def __init__(self, handle: RouterHandle, clock: AsyncClock) -> None:
        """Do nothing yet."""
        self._handle = handle
        self._clock = clock

    async def end(self, *, drain_timeout_s: float = 0.0) -> None:
        """Drain it, stop it and end its actor."""
        with contextlib.suppress(TimeoutError):
            await within(self._clock, drain_timeout_s + CALL_TIMEOUT_S, self._handle.drain(drain_timeout_s))
        await _end(self._handle, self._clock)


class Retirement:
    """Waits for routers, and programs that route for themselves, to let go of what they used before, and ends it."""

    def __init__(self, board: Board, clock: AsyncClock) -> None:
        """Do nothing yet."""
        self._board = board
        self._clock = clock

    async def run(
        self,
        hosts: Sequence[HostKeeper | StrayHost],
        routers: Sequence[RouterKeeper | StrayRouter],
        *,
        version: int,
        let_go_s: float,
    ) -> None:
        """End what the board's fleet does not have.

        Args:
            hosts: Expert hosts that are not in the table any more.
            routers: Routers that are not told to clients any more.
            version: The first version of the table without them.
            let_go_s: How long requests may take.
        """
        await end_all([router.end(drain_timeout_s=let_go_s) for router in routers])
        if routers:
            self._board.leaving_keys = {}
            self._board.changed.set()
        if hosts:
            await asyncio.gather(self._await_let_go(version, let_go_s), self._await_callers(version, let_go_s))
            await end_all([host.end() for host in hosts])

    async def _await_let_go(self, version: int, let_go_s: float) -> None:
        """Return when no router needs a table older than this version; in the end, restart those that do."""
        deadline, poll_s = self._clock.now() + let_go_s, _FIRST_POLL_S
        while late := await self._late_routers(version):
            handles = [router.handle for router in late if router.handle is not None]
            if self._clock.now() >= deadline:
                _LOG.warning("%d routers did not go over to table version %d; restarting them", len(late), version)
                await end_all([handle.kill() for handle in handles])
                return
            await self._board.bounded(handle.keep(self._board.snapshot) for handle in handles)
            await self._clock.sleep(poll_s)
            poll_s = min(2 * poll_s, _LONGEST_POLL_S)

    async def _await_callers(self, version: int, let_go_s: float) -> None:
        """Return when no program needs a table older than this version; in the end, leave those alone that do."""
        deadline, poll_s = self._clock.now() + let_go_s, _FIRST_POLL_S
        while late := self._board.callers.late(version):
            if self._clock.now() >= deadline:
                _LOG.warning("ending hosts that are still used by %s", ", ".join(late))
                return
            await self._clock.sleep(poll_s)
            poll_s = min(2 * poll_s, _LONGEST_POLL_S)

    async def _late_routers(self, version: int) -> list[RouterKeeper]:
        """Routers with requests that an older table serves. One that does not run has none."""
        states = (ReplicaState.READY, ReplicaState.SUSPECT)
        asked = [each for each in self._board.fleet.routers if each.life.state in states and each.handle is not None]
        handles = [each.handle for each in asked if each.handle is not None]
        oldest = await self._board.bounded(handle.oldest_table_version() for handle in handles)
        return [
            router
            for router, found in zip(asked, oldest, strict=True)
            if router.life.state in states and not (isinstance(found, int) and found >= version)
        ]


async def end_all(endings: Sequence[Awaitable[Any]]) -> None:
    """Wait for actors to be ended; one that could not be does not hold up the others."""
    for error in await asyncio.gather(*endings, return_exceptions=True):
        if isinstance(error, BaseException):
            _LOG.error("an actor could not be ended", exc_info=error)


async def _end(handle: HostHandle | RouterHandle, clock: AsyncClock) -> None:
    with contextlib.suppress(TimeoutError):
        await within(clock, CALL_TIMEOUT_S, handle.stop())
    await handle.kill()
    with contextlib.suppress(TimeoutError):
        await within(clock, CALL_TIMEOUT_S, handle.wait())
