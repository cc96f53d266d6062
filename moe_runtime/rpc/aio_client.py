"""The client for asyncio programs: the methods of ``MoEClient``, awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from moe_runtime.errors import DeadlineExceededError, RequestCancelledError, UnavailableError
from moe_runtime.rpc.channels import connector
from moe_runtime.rpc.client_core import ClientCore
from moe_runtime.rpc.methods import FORWARD_STREAM, path, slices
from moe_runtime.rpc.reconnecting import AioReconnections
from moe_runtime.rpc.retries import DEFAULT_RETRY_POLICY
from moe_runtime.rpc.status import error_of, is_lost
from moe_runtime.wire.messages import NO_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.rpc.channels import ClientTLS
    from moe_runtime.rpc.client_core import Attempt, ClientCall
    from moe_runtime.rpc.retries import RetryPolicy
    from moe_runtime.wire.messages import ForwardResult, RequestOptions

ResultT = TypeVar("ResultT")

#: Larger bodies are encoded and decoded in a thread, so that they do not hold up the caller's event loop.
_INLINE_BYTES = 1 << 20
#: gRPC keeps deadlines in threads of its own, which a busy machine may hold up: so long after one, the loop keeps it.
_LATE_S = 0.05


class AsyncMoEClient:
    """Calls the routers of a runtime from one event loop; cancelling a call frees its work in the router.

    Args:
        target: ``HOST:PORT`` of a router, or of several, which take turns.
        token: As for ``MoEClient``.
        tls: As for ``MoEClient``.
        insecure: As for ``MoEClient``.
        retry_policy: When calls are tried again, as for ``MoEClient``.

    Raises:
        InvalidRequestError: As ``MoEClient``.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        token: str | None = None,
        tls: bool | ClientTLS | None = None,
        insecure: bool = False,
        retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
    ) -> None:
        self._core = ClientCore(target, retry_policy=retry_policy)
        self._connector = connector(self._core.pool.addresses, token=token, tls=tls, insecure=insecure)
        # made on the first call: a channel belongs to the loop that runs when it is made
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._unary_calls: dict[tuple[str, str], grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._reconnections = AioReconnections(self._core.pool)
        self._closed = False

    async def forward(
        self,
        inputs: Any,
        *,
        layer: str,
        options: RequestOptions[Any] = NO_OPTIONS,
        timeout_s: float | None = None,
        return_routing: bool = False,
    ) -> ForwardResult:
        """Run a layer over some tokens; arguments, result and errors are those of ``MoEClient.forward``."""

        def encode() -> ClientCall[ForwardResult]:
            return self._core.forward(
                inputs, layer=layer, options=options, timeout_s=timeout_s, return_routing=return_routing
            )

        is_large = getattr(inputs, "nbytes", 0) > _INLINE_BYTES
        return await self._run(await asyncio.to_thread(encode) if is_large else encode())

    async def describe(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """What a router serves, as ``MoEClient.describe``."""
        return await self._run(self._core.describe(timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """How a router is doing, as ``MoEClient.status``."""
        return await self._run(self._core.status(timeout_s))

    async def close(self) -> None:
        """Close the connections; calls under way end with ``RequestCancelledError``. Safe to call twice."""
        self._closed = True
        await self._reconnections.close()
        for channel in self._channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: ClientCall[ResultT]) -> ResultT:
        while True:
            if call.attempt.delay_s:
                await asyncio.sleep(call.attempt.delay_s)
            if self._closed:
                raise UnavailableError("expected an open client, found this one closed")
            try:
                timeout_s = call.attempt.timeout_s
                async with asyncio.timeout(None if timeout_s is None else timeout_s + _LATE_S):
                    reply = await self._send(call.attempt)
            except TimeoutError as exc:
                late = DeadlineExceededError("the call's deadline passed without an answer")
                late.__cause__ = exc
                self._fail(call, late, is_lost=False)
            except grpc.aio.AioRpcError as exc:
                if self._closed:
                    raise RequestCancelledError("the client was closed while the call was under way") from exc
                error = error_of(exc.code(), exc.details(), exc.trailing_metadata())
                error.__cause__ = exc
                self._fail(call, error, is_lost=is_lost(error, exc.trailing_metadata()))
            else:
                is_large = len(reply) > _INLINE_BYTES
                return await asyncio.to_thread(call.succeeded, reply) if is_large else call.succeeded(reply)

    def _fail(self, call: ClientCall[Any], error: MoERuntimeError, *, is_lost: bool) -> None:
        address = call.attempt.address
        try:
            call.failed(error, is_lost=is_lost)
        finally:
            if is_lost:
                self._reconnections.watch(address, self._channels[address])

    async def _send(self, attempt: Attempt) -> bytes:
        channel = self._channel(attempt.address)
        name, metadata = path(attempt.method), self._connector.metadata
        if attempt.method != FORWARD_STREAM:
            call = self._unary_calls.get((attempt.address, name))
            if call is None:
                call = self._unary_calls[attempt.address, name] = channel.unary_unary(name)
            unary: bytes = await call(attempt.body, timeout=attempt.timeout_s, metadata=metadata)
            return unary
        stream = channel.stream_stream(name)(slices(attempt.body), timeout=attempt.timeout_s, metadata=metadata)
        try:
            return b"".join([piece async for piece in stream])
        finally:
            stream.cancel()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._connector.aio_channel(address)
        return self._channels[address]
