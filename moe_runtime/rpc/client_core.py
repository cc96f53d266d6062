"""All that a client decides, without any I/O: what to send where, whether to try again, what an answer means.

``MoEClient`` and ``AsyncMoEClient`` are two shells around it, which send, wait and sleep.
"""

from __future__ import annotations

import math
import random
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moe_runtime.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MoERuntimeError,
    OverloadedError,
    StreamRequiredError,
    UnavailableError,
)
from moe_runtime.rpc.arrays import converter_like, to_wire
from moe_runtime.rpc.balancing import AddressPool, addresses_of
from moe_runtime.rpc.methods import DESCRIBE, FORWARD, FORWARD_STREAM, STATUS, UNARY_BYTES
from moe_runtime.rpc.retries import RetryBudget, RetryPolicy
from moe_runtime.rpc.wishes import options_to_wire
from moe_runtime.wire.codec import decode_info, decode_reply, encode_info, encode_request
from moe_runtime.wire.messages import ForwardRequest, ForwardResult, RequestOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ResultT = TypeVar("ResultT")

#: gRPC cannot say more; routers have a maximum far below it.
_LONGEST_TIMEOUT_S = 30 * 24 * 3600.0
#: How long a hint to come back later may hold up a call that has no deadline.
_LONGEST_HINT_S = 10.0


@dataclass(frozen=True)
class Attempt:
    """One try of a call.

    Attributes:
        delay_s: How long to wait before it.
        address: Router to call.
        method: Method to call.
        body: What to send.
        timeout_s: Deadline from the moment of sending; None is the router's default.
    """

    delay_s: float
    address: str
    method: str
    body: bytes
    timeout_s: float | None


class ClientCore:
    """What the calls of one client share. Thread-safe.

    Args:
        target: ``HOST:PORT`` of a router, or of several.
        retry_policy: When to try again.
        now: Tells the time in seconds.
        rng: Draws jitter.

    Raises:
        InvalidRequestError: If the target is no address.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        retry_policy: RetryPolicy,
        now: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.pool = AddressPool(addresses_of(target), now=now)
        self.retry_policy = retry_policy
        self.retry_budget = RetryBudget(retry_policy)
        self.now = now
        self.rng = rng or random.Random()  # nosec B311  # for jitter

    def forward(
        self,
        inputs: Any,
        *,
        layer: str,
        options: RequestOptions[Any],
        timeout_s: float | None,
        return_routing: bool,
    ) -> ClientCall[ForwardResult]:
        """A call that runs a layer; its arguments are those of ``MoEClient.forward``."""
        request = ForwardRequest(
            request_id=uuid.uuid4().hex,
            layer=layer,
            inputs=to_wire(inputs),
            options=options_to_wire(options),
            return_routing=return_routing,
        )
        body = encode_request(request)
        convert = converter_like(inputs)

        def decode(reply_body: bytes) -> ForwardResult:
            reply = decode_reply(reply_body)
            return ForwardResult(outputs=convert(reply.outputs), report=reply.report)

        method = FORWARD if len(body) <= UNARY_BYTES else FORWARD_STREAM
        return ClientCall(
            self, method=method, body=body, decode=decode, timeout_s=timeout_s, request_id=request.request_id
        )

    def describe(self, timeout_s: float | None) -> ClientCall[dict[str, Any]]:
        """A call that asks what a router serves."""
        return ClientCall(self, method=DESCRIBE, body=encode_info(), decode=decode_info, timeout_s=timeout_s)

    def status(self, timeout_s: float | None) -> ClientCall[dict[str, Any]]:
        """A call that asks how a router is doing."""
        return ClientCall(self, method=STATUS, body=encode_info(), decode=decode_info, timeout_s=timeout_s)


class ClientCall(Generic[ResultT]):
    """One call: its attempts, one after the other, under one deadline and with one body, so one request id.

    A shell makes the ``attempt``; then it either returns ``succeeded(reply)``, or reports ``failed(error)``, which
    raises the error unless there is another ``attempt`` to make.
    """

    def __init__(
        self,
        core: ClientCore,
        *,
        method: str,
        body: bytes,
        decode: Callable[[bytes], ResultT],
        timeout_s: float | None,
        request_id: str | None = None,
    ) -> None:
        self._core = core
        self._request_id = request_id
        self._decode = decode
        self._deadline = _deadline(core.now(), timeout_s)
        self._num_attempts = 0
        self.attempt = self._next_attempt(method, body, delay_s=0.0)

    def succeeded(self, reply: bytes) -> ResultT:
        """What the reply holds.

        Raises:
            ProtocolError: If it is no reply.
            ProtocolVersionError: If the router speaks another major version.
        """
        self._core.pool.mark_answered(self.attempt.address)
        self._core.retry_budget.earn()
        return self._decode(reply)

    def failed(self, error: MoERuntimeError, *, is_lost: bool = False) -> None:
        """Set ``attempt`` to the next one.

        Args:
            error: What the attempt ended with.
            is_lost: Whether no router said so: it could not be reached, or the connection broke. Then the shell
                tells the core's pool when the address can be reached again.

        Raises:
            MoERuntimeError: The error, if trying again is not worth it, or not within the budget or the deadline.
        """
        method, body = self.attempt.method, self.attempt.body
        if isinstance(error, StreamRequiredError) and method == FORWARD:
            self.attempt = self._next_attempt(FORWARD_STREAM, body, delay_s=0.0)
            return
        if is_lost:
            self._core.pool.mark_lost(self.attempt.address)
        elif isinstance(error, UnavailableError):
            self._core.pool.mark_failed(self.attempt.address)
        delay_s = self._delay_s(error)
        in_time = self._deadline is None or self._core.now() + delay_s < self._deadline
        may_retry = in_time and self._num_attempts < self._core.retry_policy.max_attempts
        if not may_retry or not (self._goes_elsewhere(error) or self._core.retry_budget.spend()):
            raise self._with_story(error)
        self.attempt = self._next_attempt(method, body, delay_s=delay_s)

    def _goes_elsewhere(self, error: MoERuntimeError) -> bool:
        """Whether the next attempt is at a router in no trouble: that adds nothing to the load of one that is.

        It costs nothing, since all calls under way at a router are lost together. The address that failed rests, so
        this happens once per call and router.
        """
        return isinstance(error, UnavailableError) and self._core.pool.has_usable()

    def _delay_s(self, error: MoERuntimeError) -> float:
        """How long to wait before a retry; raises the error where none would help."""
        backoff_s = self._core.retry_policy.backoff_s(self._num_attempts - 1, self._core.rng)
        if isinstance(error, UnavailableError):
            return 0.0 if self._core.pool.has_usable() else backoff_s
        if isinstance(error, OverloadedError):
            hint_s = error.retry_after_ms / 1e3
            if self._deadline is not None or hint_s <= _LONGEST_HINT_S:
                return max(hint_s, backoff_s)
        raise self._with_story(error)

    def _with_story(self, error: MoERuntimeError) -> MoERuntimeError:
        about = "" if self._request_id is None else f"; request {self._request_id}"
        error.add_note(f"after {self._num_attempts} attempts, the last at {self.attempt.address}{about}")
        return error

    def _next_attempt(self, method: str, body: bytes, *, delay_s: float) -> Attempt:
        left_s = None if self._deadline is None else self._deadline - self._core.now() - delay_s
        if left_s is not None and left_s <= 0:
            raise DeadlineExceededError("the call's deadline passed before it was sent")
        self._num_attempts += 1
        return Attempt(delay_s=delay_s, address=self._core.pool.pick(), method=method, body=body, timeout_s=left_s)


def _deadline(now: float, timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or math.isnan(timeout_s):
        raise InvalidRequestError(f"timeout_s: expected a number of seconds, found {timeout_s!r}")
    return now + min(float(timeout_s), _LONGEST_TIMEOUT_S)
