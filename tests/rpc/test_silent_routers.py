"""Routers whose machine vanishes without a word: no end of a connection, no refusal, nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fakes.live_router import WIDTH, StartRouter
from moe_runtime.errors import DeadlineExceededError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.client_core import Attempt
from moe_runtime.rpc.retries import RetryPolicy

ROWS = np.ones((2, WIDTH), np.float32)
DEADLINE_S = 5.0


class Cable:
    """Carries one connection to a router, until it is cut: then it stays open, and nothing gets through."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._router = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._connect)]
        self._threads[0].start()
        self._is_cut = False
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        self._is_cut = True

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            with_shutdown(end)
        for thread in self._threads:
            thread.join()

    def _connect(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.create_connection(self._router)
        self._ends += [near, far]
        for source, sink in ((near, far), (far, near)):
            self._threads.append(threading.Thread(target=self._carry, args=(source, sink)))
            self._threads[-1].start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self._is_cut:
                    sink.sendall(data)
        except OSError:
            return


def with_shutdown(end: socket.socket) -> None:
    """Close a socket that another thread may be reading from."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def cables() -> Iterator[list[Cable]]:
    cables: list[Cable] = []
    yield cables
    for cable in cables:
        cable.close()


def test_call_under_way_at_a_router_that_falls_silent_is_answered_by_another(
    start_router: StartRouter, cables: list[Cable]
) -> None:
    vanishing, living = start_router(), start_router()
    living.free()
    cables.append(cable := Cable(vanishing.address))
    with MoEClient([cable.address, living.address]) as client, ThreadPoolExecutor(1) as background:
        call = background.submit(client.forward, ROWS, layer="stuck", timeout_s=DEADLINE_S)
        vanishing.wait_for(lambda status: status["num_messages"] == 1)
        cable.cut()
        assert call.result().report.num_served == 4


def test_router_that_never_says_a_word_costs_no_call(start_router: StartRouter) -> None:
    living = start_router()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with MoEClient([address, living.address]) as client:
            assert client.forward(ROWS, layer="vectors", timeout_s=DEADLINE_S).report.num_served == 4


def test_router_that_takes_its_time_is_not_taken_for_silent(start_router: StartRouter) -> None:
    live = start_router()
    # Four of the client's questions whether the router is there; too many of them would end the connection.
    with (
        MoEClient(live.address, retry_policy=RetryPolicy(max_attempts=1)) as client,
        pytest.raises(DeadlineExceededError),
    ):
        client.forward(ROWS, layer="stuck", timeout_s=4.5)


async def test_a_deadline_is_kept_where_grpc_itself_is_silent() -> None:
    class Silent(AsyncMoEClient):
        async def _send(self, attempt: Attempt) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

    async with Silent("127.0.0.1:1") as client:
        with pytest.raises(DeadlineExceededError, match="passed without an answer"):
            await client.forward(ROWS, layer="any", timeout_s=0.01)
