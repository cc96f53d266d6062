"""The router's gRPC methods: bytes in, the service's answer as bytes out, or one typed error."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from moe_runtime.errors import MoERuntimeError, RequestTooLargeError, StreamRequiredError
from moe_runtime.rpc.access import caller_of
from moe_runtime.rpc.border import Border
from moe_runtime.rpc.intake import Intake
from moe_runtime.rpc.methods import (
    DESCRIBE,
    FORWARD,
    FORWARD_STREAM,
    SERVICE,
    STATUS,
    UNARY_BYTES,
    slices,
)
from moe_runtime.rpc.pending import Answers, PendingAnswer
from moe_runtime.rpc.status import metadata_of, status_of
from moe_runtime.service.requests import LayerRequest
from moe_runtime.wire.codec import decode_info_request, decode_request, encode_info, encode_reply
from moe_runtime.wire.messages import ForwardReply
from moe_runtime.wire.torch_tensors import from_torch, to_torch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from concurrent.futures import Executor

    from moe_runtime.config.runtime import LimitsConfig
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Clock
    from moe_runtime.service.requests import LayerAnswer
    from moe_runtime.service.router_service import RouterService
    from moe_runtime.wire.messages import ForwardRequest

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

#: Bodies above this are decoded and encoded in a worker thread, so that nobody's call waits for them. Below it the
#: hand-over to the thread and back costs more than the work.
_INLINE_BYTES = 256 << 10
_REPLY_OVERHEAD_BYTES = 16 << 10
_ROUTING_BYTES_PER_ASSIGNMENT = 8 + 8 + 4 + 1
_BYTES_PER_SHARED_WEIGHT = 4


class RouterHandlers:
    """The methods of ``moe_runtime.v1.Router``. Owned by the server's event loop.

    Args:
        service: Answers the requests.
        limits: What one request may ask for.
        info: Goes into descriptions, before what the service says.
        clock: The service's clock.
        executor: Runs what would hold up the event loop.
    """

    def __init__(
        self,
        service: RouterService,
        *,
        limits: LimitsConfig,
        info: Mapping[str, Any],
        clock: Clock,
        executor: Executor,
    ) -> None:
        self._service = service
        self._limits = limits
        self._info = dict(info)
        self._clock = clock
        self._executor = executor
        self._intake = Intake(limits, num_levels=service.num_levels)
        self._answers = Answers()
        self._border = Border()
        self._num_calls: Counter[str] = Counter()
        self._num_errors: Counter[str] = Counter()

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """The methods as gRPC wants them; bodies stay bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                FORWARD: grpc.unary_unary_rpc_method_handler(self._forward),
                FORWARD_STREAM: grpc.stream_stream_rpc_method_handler(self._forward_stream),
                DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
                STATUS: grpc.unary_unary_rpc_method_handler(self._status),
            },
        )

    def count_error(self, error: MoERuntimeError) -> None:
        """Count an error that a call was answered with."""
        self._num_errors[type(error).__name__] += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """``num_calls`` by method and ``num_errors`` by the name of the error. Thread-safe."""
        return {"num_calls": dict(self._num_calls), "num_errors": dict(self._num_errors)}

    async def _forward(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await self._or_abort(FORWARD, self._answer_unary(body, context), context)

    async def _forward_stream(
        self, pieces: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        reply = await self._or_abort(FORWARD_STREAM, self._answer_stream(pieces, context), context)
        for piece in slices(reply):
            yield piece

    async def _describe(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await self._or_abort(DESCRIBE, self._answer_info(body, self._description), context)

    async def _status(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await self._or_abort(STATUS, self._answer_info(body, self._load), context)

    async def _answer_unary(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        most = self._limits.max_request_bytes
        if len(body) > most:
            raise RequestTooLargeError(f"expected at most {most} bytes in a request, found {len(body)}; split it")
        timeout_s = self._intake.timeout_s(context.time_remaining())
        deadline = self._clock.now() + timeout_s
        async with self._intake.admitted(timeout_s, num_bytes=len(body)):
            pending = PendingAnswer(self._service, self._answers)
            try:
                submit = partial(self._submit, body, pending, deadline=deadline, client=caller_of(context), unary=True)
                await self._off_loop_if_large(len(body), submit)
                reply = await self._encoded(await pending.wait())
            finally:
                pending.withdraw()
        if len(reply) > UNARY_BYTES:
            raise _stream_required(len(reply))
        return reply

    async def _answer_stream(
        self, pieces: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        timeout_s = self._intake.timeout_s(context.time_remaining())
        deadline = self._clock.now() + timeout_s
        async with self._intake.admitted(timeout_s):
            pending = PendingAnswer(self._service, self._answers)
            try:
                with self._intake.streamed() as body:
                    content = await body.receive(pieces)
                    submit = partial(
                        self._submit, content, pending, deadline=deadline, client=caller_of(context), unary=False
                    )
                    await self._off_loop_if_large(len(content), submit)
                return await self._encoded(await pending.wait())
            finally:
                pending.withdraw()

    async def _answer_info(self, body: bytes, info: Callable[[], dict[str, Any]]) -> bytes:
        decode_info_request(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: encode_info(info()))

    def _submit(
        self, body: bytes | bytearray, pending: PendingAnswer, *, deadline: float, client: str, unary: bool
    ) -> None:
        request = decode_request(body)
        if logger.isEnabledFor(logging.DEBUG):
            about = {"request_id": request.request_id, "layer": request.layer}
            logger.debug("received %d tokens", request.inputs.shape[0] if request.inputs.shape else 0, extra=about)
        if unary:
            _check_reply_fits(request, self._service.layer(request.layer))
        pending.submit(
            LayerRequest(
                request_id=request.request_id,
                layer=request.layer,
                tokens=to_torch(request.inputs),
                options=request.options.map_arrays(to_torch),
                return_routing=request.return_routing,
                deadline=deadline,
                client=client,
            )
        )

    async def _encoded(self, answer: LayerAnswer) -> bytes:
        def encode() -> bytes:
            report = self._border.report(answer.report)
            return encode_reply(ForwardReply(outputs=from_torch(answer.outputs), report=report))

        return await self._off_loop_if_large(answer.outputs.nbytes, encode)

    async def _off_loop_if_large(self, num_bytes: int, work: Callable[[], ResultT]) -> ResultT:
        if num_bytes <= _INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _description(self) -> dict[str, Any]:
        return {**self._info, **self._service.describe()}

    def _load(self) -> dict[str, Any]:
        return {**self._service.status(), "rpc": self.counts()}

    async def _or_abort(
        self,
        method: str,
        answer: Awaitable[bytes],
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> bytes:
        """The answer, or the end of the call with the status of the error that it raised."""
        self._num_calls[method] += 1
        try:
            return await answer
        except Exception as exc:  # the border: gRPC would send the text of whatever gets past here
            error = self._border.error(exc, method=method)
        self.count_error(error)
        code, details = status_of(error)
        await context.abort(code, details, metadata_of(error))
        raise error  # abort has raised; this tells the type checker


def _check_reply_fits(request: ForwardRequest, layer: RoutedLayer) -> None:
    """Refuse, before anything is computed, what ``Forward`` could not carry back."""
    if request.inputs.shape[1:] != layer.item_shape:
        # Validation will say so, which helps more than anything about the size of an answer.
        return
    num_tokens = request.inputs.shape[0]
    reply_bytes = num_tokens * math.prod(layer.out_shape) * layer.dtype.itemsize + _REPLY_OVERHEAD_BYTES
    if request.return_routing:
        reply_bytes += num_tokens * layer.policy.max_k * _ROUTING_BYTES_PER_ASSIGNMENT
        reply_bytes += num_tokens * layer.num_shared * _BYTES_PER_SHARED_WEIGHT
    if reply_bytes > UNARY_BYTES:
        raise _stream_required(reply_bytes)


def _stream_required(reply_bytes: int) -> StreamRequiredError:
    return StreamRequiredError(
        f"expected an answer of at most {UNARY_BYTES} bytes, found one of {reply_bytes}: call {FORWARD_STREAM}"
    )
