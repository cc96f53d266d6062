"""The client for ordinary programs; ``aio_client`` has its twin for asyncio."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from moe_runtime.errors import RequestCancelledError, UnavailableError
from moe_runtime.rpc.channels import connector
from moe_runtime.rpc.client_core import ClientCore
from moe_runtime.rpc.methods import FORWARD_STREAM, path, slices
from moe_runtime.rpc.reconnecting import Reconnections
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


class MoEClient:
    """Calls the routers of a runtime. Thread-safe; connects on the first call, and again after a loss.

    Args:
        target: ``HOST:PORT`` of a router, or of several, which take turns.
        token: Shown to the routers; None takes that of the environment's ``MOE_RUNTIME_TOKEN``, if there is one.
        tls: How routers are called by TLS; True trusts the usual CAs; None is plain text.
        insecure: Send the token in plain text to other machines, too.
        retry_policy: When calls are tried again: after ``UnavailableError``, and after ``OverloadedError`` where
            the router's hint fits the deadline. The request id stays the same.

    Raises:
        InvalidRequestError: If the target is no address, a file of ``tls`` cannot be read, or the token cannot be
            sent, or not without others on the way reading it.
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
        self._channels = {address: self._connector.channel(address) for address in self._core.pool.addresses}
        self._reconnections = Reconnections(self._core.pool)
        self._closed = False

    def forward(
        self,
        inputs: Any,
        *,
        layer: str,
        options: RequestOptions[Any] = NO_OPTIONS,
        timeout_s: float | None = None,
        return_routing: bool = False,
    ) -> ForwardResult:
        """Run a layer over some tokens.

        Args:
            inputs: ``(num_tokens, *item_shape)`` in the layer's dtype, numpy or torch. Torch tensors are detached.
            layer: Name of the layer.
            options: What else the request asks for; arrays are numpy or torch.
            timeout_s: Deadline for everything, retries included; None is the router's default.
            return_routing: Whether the report lists every assignment.

        Returns:
            Outputs ``(num_tokens, *out_shape)`` and their report. Outputs are numpy, read-only, where the inputs
            were numpy (bfloat16 as float32), and torch on the same device where they were torch.

        Raises:
            InvalidRequestError: If the request is wrong; its subclasses say how.
            OverloadedError: If the router's queue is full, also after retries.
            DeadlineExceededError: If the answer was not there in time.
            UnavailableError: If no router could be reached, also after retries.
            MoERuntimeError: Whatever else the router answered with.
        """
        call = self._core.forward(
            inputs, layer=layer, options=options, timeout_s=timeout_s, return_routing=return_routing
        )
        return self._run(call)

    def describe(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """What a router serves: layers, experts, their kinds, shapes, replicas and versions.

        Raises:
            MoERuntimeError: As ``forward``.
        """
        return self._run(self._core.describe(timeout_s))

    def status(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """How a router is doing: counters per layer and expert, queue depth, batches.

        Raises:
            MoERuntimeError: As ``forward``.
        """
        return self._run(self._core.status(timeout_s))

    def close(self) -> None:
        """Close the connections; calls under way end with ``RequestCancelledError``. Safe to call twice."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: ClientCall[ResultT]) -> ResultT:
        while True:
            time.sleep(call.attempt.delay_s)
            if self._closed:
                raise UnavailableError("expected an open client, found this one closed")
            try:
                reply = self._send(call.attempt)
            except grpc.RpcError as exc:
                if self._closed:
                    raise RequestCancelledError("the client was closed while the call was under way") from exc
                error = error_of(exc.code(), exc.details(), exc.trailing_metadata())
                error.__cause__ = exc
                self._fail(call, error, is_lost=is_lost(error, exc.trailing_metadata()))
            else:
                return call.succeeded(reply)

    def _fail(self, call: ClientCall[Any], error: MoERuntimeError, *, is_lost: bool) -> None:
        address = call.attempt.address
        try:
            call.failed(error, is_lost=is_lost)
        finally:
            if is_lost:
                self._reconnections.watch(address, self._channels[address])

    def _send(self, attempt: Attempt) -> bytes:
        channel = self._channels[attempt.address]
        name, metadata = path(attempt.method), self._connector.metadata
        if attempt.method != FORWARD_STREAM:
            unary: bytes = channel.unary_unary(name)(attempt.body, timeout=attempt.timeout_s, metadata=metadata)
            return unary
        stream = channel.stream_stream(name)(slices(attempt.body), timeout=attempt.timeout_s, metadata=metadata)
        try:
            return b"".join(stream)
        finally:
            stream.cancel()  # only matters where the caller was interrupted
