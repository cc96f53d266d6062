"""A router's gRPC server, in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from moe_runtime.config.security import SecurityConfig
from moe_runtime.errors import StartError
from moe_runtime.rpc.access import Doorman
from moe_runtime.rpc.handlers import RouterHandlers
from moe_runtime.rpc.methods import SERVER_OPTIONS, SERVICE
from moe_runtime.rpc.server_tls import server_credentials
from moe_runtime.rpc.tokens import TokenFile
from moe_runtime.service.ports import Clock, MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.runtime import LimitsConfig
    from moe_runtime.service.router_service import RouterService

_NUM_WORKERS = 4
#: gRPC itself refuses calls beyond the limit plus these, which leave room for health checks and descriptions.
_SPARE_CALLS = 64
#: Beyond its most streams a connection's calls wait without a word, or, before the client has heard of the number, are
#: reset: so it is far above the number of calls that are refused with an error.
_MIN_STREAMS = 8192


class RpcServer:
    """Serves a router service over gRPC. ``start``, ``drain`` and ``stop`` are for any thread but its own.

    Args:
        service: Answers the requests; the server neither starts nor closes it.
        address: ``HOST:PORT`` to bind; port 0 is any.
        limits: What one request may ask for.
        info: Goes into descriptions, before what the service says.
        clock: The service's clock, which deadlines are told in.
        security: Certificates and tokens; plain text, and everybody may call, when None.

    Raises:
        ConfigError: If a certificate, its key or the tokens cannot be used.
    """

    def __init__(
        self,
        service: RouterService,
        *,
        address: str,
        limits: LimitsConfig,
        info: Mapping[str, Any],
        clock: Clock | None = None,
        security: SecurityConfig | None = None,
    ) -> None:
        self._address = address
        self._limits = limits
        self._num_levels = service.num_levels
        security = security or SecurityConfig()
        # Files first: nothing is started that would have to be ended.
        self._credentials, self._tokens = _read_files(security)
        self._executor = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="rpc-worker")
        self._handlers = RouterHandlers(
            service, limits=limits, info=info, clock=clock or MonotonicClock(), executor=self._executor
        )
        self._doormen = () if self._tokens is None else (Doorman(self._tokens, on_refused=self._handlers.count_error),)
        self._bound: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="rpc-server", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = asyncio.Event()
        self._stopping = asyncio.Event()
        self._grace_s = 0.0

    @property
    def tokens(self) -> TokenFile | None:
        """The tokens of those who may call; None where everybody may."""
        return self._tokens

    def start(self) -> str:
        """Bind and serve; once.

        Returns:
            The address, ``HOST:PORT``, with the port that was bound.

        Raises:
            StartError: If the address cannot be bound.
        """
        self._thread.start()
        return self._bound.result()

    def counts(self) -> dict[str, dict[str, int]]:
        """``num_calls`` by method and ``num_errors`` by the name of the error. Thread-safe."""
        return self._handlers.counts()

    def next_turn(self) -> Future[None]:
        """Done when the server's loop has come round once more; never, where it has ended."""
        turn: Future[None] = Future()
        if self._loop is not None:
            # a loop that is closed has ended
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(turn.set_result, None)
        return turn

    def drain(self) -> None:
        """Tell health checks that no new requests are wanted; calls go on."""
        self._call_soon(self._draining)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those under way finish for ``grace_s``, cancel the rest. Safe to call twice."""
        self._grace_s = grace_s
        self._call_soon(self._stopping)
        if self._thread.ident is not None:
            self._thread.join()
        self._executor.shutdown()

    def _call_soon(self, event: asyncio.Event) -> None:
        if self._loop is not None:
            # a loop that is closed has stopped already
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(event.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:
            if self._bound.done():
                raise
            self._bound.set_exception(exc)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        most_calls = self._num_levels * self._limits.max_concurrent_requests + _SPARE_CALLS
        server = grpc.aio.server(
            options=(*SERVER_OPTIONS, *_limit_options(self._limits, most_calls)),
            interceptors=self._doormen,
            maximum_concurrent_rpcs=most_calls,
        )
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        server.add_generic_rpc_handlers((self._handlers.generic_handler(),))
        bound = self._bind(server)
        for name in ("", SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        self._bound.set_result(bound)
        await self._until_stopped(server, health_servicer)

    def _bind(self, server: grpc.aio.Server) -> str:
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._address)
            else:
                port = server.add_secure_port(self._address, self._credentials)
        except RuntimeError as exc:
            raise StartError(
                f"expected to bind {self._address}, found it taken or not an address of this machine:"
                " choose another, or port 0 for any"
            ) from exc
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def _until_stopped(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        draining = asyncio.create_task(self._draining.wait())
        await asyncio.wait((stopping, draining), return_when=asyncio.FIRST_COMPLETED)
        await health_servicer.enter_graceful_shutdown()
        await stopping
        draining.cancel()
        await server.stop(self._grace_s)


def check_security(security: SecurityConfig) -> None:
    """Check the files of a configuration as a server would that starts on this machine.

    Raises:
        ConfigError: If a certificate, its key or the tokens cannot be used.
    """
    _read_files(security)


def _read_files(security: SecurityConfig) -> tuple[grpc.ServerCredentials | None, TokenFile | None]:
    credentials = None if security.tls is None else server_credentials(security.tls)
    return credentials, None if security.tokens is None else TokenFile(security.tokens)


def _limit_options(limits: LimitsConfig, most_calls: int) -> tuple[tuple[str, int], ...]:
    return (
        # Both: between them gRPC would refuse calls at random.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", max(_MIN_STREAMS, 2 * most_calls)),
    )
