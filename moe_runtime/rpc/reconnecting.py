"""Notices when a router can be reached again: its address rests until then, and calls go elsewhere."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from moe_runtime.rpc.balancing import AddressPool

#: Any method would do: health checks are answered by whoever serves.
_CHECK = "/grpc.health.v1.Health/Check"
_READY = grpc.ChannelConnectivity.READY
_SHUTDOWN = grpc.ChannelConnectivity.SHUTDOWN


class Reconnections:
    """Connects lost addresses again in the background, each for as long as it takes. Thread-safe.

    Args:
        pool: Is told of those that are reached.
    """

    def __init__(self, pool: AddressPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._watched: set[str] = set()

    def watch(self, address: str, channel: grpc.Channel) -> None:
        """Connect an address, which the pool has been told is lost."""
        with self._lock:
            if address in self._watched:
                return
            self._watched.add(address)
        # Waits for a connection; whatever is answered then. A subscription to the channel's state would do, but its
        # thread does not survive that the channel is closed.
        answer = channel.unary_unary(_CHECK).future(b"", wait_for_ready=True)
        answer.add_done_callback(lambda _answer: self._connected(address))

    def _connected(self, address: str) -> None:
        with self._lock:
            self._watched.discard(address)
        self._pool.mark_connected(address)


class AioReconnections:
    """As ``Reconnections``, on one event loop.

    Args:
        pool: Is told of those that are reached.
    """

    def __init__(self, pool: AddressPool) -> None:
        self._pool = pool
        self._watches: dict[str, asyncio.Task[None]] = {}

    def watch(self, address: str, channel: grpc.aio.Channel) -> None:
        """Connect an address, which the pool has been told is lost."""
        if address not in self._watches:
            self._watches[address] = asyncio.create_task(self._connect(address, channel))

    async def close(self) -> None:
        """Give up; before the channels are closed."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _connect(self, address: str, channel: grpc.aio.Channel) -> None:
        try:
            while (state := channel.get_state(try_to_connect=True)) not in (_READY, _SHUTDOWN):
                await channel.wait_for_state_change(state)
        finally:
            del self._watches[address]
        if state is _READY:
            self._pool.mark_connected(address)
