"""What a router takes in at once: calls, streamed bytes and time, each with its limit."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import DeadlineExceededError, OverloadedError, ProtocolError, RequestTooLargeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterator

    from moe_runtime.config.runtime import LimitsConfig

#: Bodies of the largest size whose bytes may be held together.
_LARGEST_BODIES = 4
#: Calls beyond those that the service may hold: it knows the clients, and refuses the one that has too many.
_SPARE_CALLS = 32
_RETRY_AFTER_MS = 50.0


class Intake:
    """Counts what one router holds of requests that the service does not know yet. Owned by the event loop.

    Args:
        limits: What one request may ask for, and how many the service holds on one level of nesting.
        num_levels: Levels of nesting that the service has.
    """

    def __init__(self, limits: LimitsConfig, *, num_levels: int = 1) -> None:
        self._limits = limits
        self._num_levels = num_levels
        self._num_calls = 0
        self._num_bytes = 0

    def timeout_s(self, requested_s: float | None) -> float:
        """How long a call may take: what it asks for, within the limits; the default where it asks nothing."""
        if requested_s is None:
            return self._limits.default_timeout_s
        return min(requested_s, self._limits.max_timeout_s)

    @asynccontextmanager
    async def admitted(self, timeout_s: float, *, num_bytes: int = 0) -> AsyncIterator[None]:
        """One call's place in the router, for ``timeout_s`` at most, and that of its body if that is here already.

        Raises:
            OverloadedError: If all places are taken, or bodies fill the memory set aside for them.
            DeadlineExceededError: If the time is over.
        """
        most = self._num_levels * self._limits.max_concurrent_requests + _SPARE_CALLS
        if self._num_calls >= most:
            raise OverloadedError(
                f"the router holds {most} requests, its most: try again later", retry_after_ms=_RETRY_AFTER_MS
            )
        self._take_bytes(num_bytes)
        self._num_calls += 1
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as exc:
            raise DeadlineExceededError(f"expected an answer within {timeout_s:.3f} s, found none") from exc
        finally:
            self._num_calls -= 1
            self._num_bytes -= num_bytes

    @contextmanager
    def streamed(self) -> Iterator[StreamedBody]:
        """A body about to arrive in slices; its bytes count until the end of the block."""
        body = StreamedBody(self)
        try:
            yield body
        finally:
            self._num_bytes -= len(body.content)

    def _reserve(self, body: bytearray, num_bytes: int) -> None:
        most = self._limits.max_request_bytes
        if len(body) + num_bytes > most:
            raise RequestTooLargeError(f"expected at most {most} bytes in a request, found more; split it")
        self._take_bytes(num_bytes)

    def _take_bytes(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > _LARGEST_BODIES * self._limits.max_request_bytes:
            raise OverloadedError("too many large requests are arriving at once", retry_after_ms=_RETRY_AFTER_MS)
        self._num_bytes += num_bytes


class StreamedBody:
    """The body of a streamed request, joined as it arrives."""

    def __init__(self, intake: Intake) -> None:
        self.content = bytearray()
        self._intake = intake

    async def receive(self, pieces: AsyncIterable[Any]) -> bytearray:
        """All slices, joined.

        Raises:
            ProtocolError: If a slice is empty.
            RequestTooLargeError: As soon as they exceed the largest request.
            OverloadedError: If other bodies have taken the memory set aside for them.
        """
        async for piece in pieces:
            if not piece:
                raise ProtocolError("expected slices of at least one byte in the stream, found an empty one")
            self._intake._reserve(self.content, len(piece))
            self.content += piece
        return self.content
