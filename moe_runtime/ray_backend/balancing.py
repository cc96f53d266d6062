"""Balances experts while serving: asks the routers for their loads, and publishes the biases that these lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.service.online_bias import AskedCounts
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from moe_runtime.ray_backend.board import Board
    from moe_runtime.ray_backend.spawner import AsyncClock

#: A router that takes longer tells its loads the next time; the others need not wait for it.
_ANSWER_WITHIN_S = 1.0


class Balancing:
    """Steps the biases of a board's layers. Owned by the controller's event loop."""

    def __init__(self, board: Board, clock: AsyncClock) -> None:
        """Ask nobody yet."""
        self._board = board
        self._clock = clock

    async def run(self) -> None:
        """Balance for ever; every step is a version of the table."""
        while True:
            await self._clock.sleep(self._board.bias.poll_every_s)
            if self._board.bias.layers:
                await self._count()
                if self._board.bias.step(self._clock.now()):
                    await self._board.publish()

    async def _count(self) -> None:
        bias = self._board.bias
        routers = [
            (keeper.index, keeper.handle)
            for keeper in self._board.fleet.routers
            if keeper.life.state in (ReplicaState.READY, ReplicaState.SUSPECT) and keeper.handle is not None
        ]
        said = await self._board.bounded((handle.asked(bias.layers) for _, handle in routers), _ANSWER_WITHIN_S)
        for (index, _), counts in zip(routers, said, strict=True):
            if isinstance(counts, AskedCounts):
                bias.take(index, counts)
