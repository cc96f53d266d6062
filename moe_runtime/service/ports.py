"""The ports of the service: what it asks of a clock and of whatever carries rows to experts and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor


class Clock(Protocol):
    """Tells the time; tests bring their own."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        return time.monotonic()


@dataclass(frozen=True)
class Endpoint:
    """Where one expert host listens.

    Attributes:
        incarnation: Random 64-bit number of the host's process; a successor at the same address has another.
        node: Name of the node; routers on it use ``local``.
        local: Address for routers on the same node, or None.
        remote: Address for routers on other nodes, or None.
    """

    incarnation: int
    node: str
    local: str | None = None
    remote: str | None = None


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a message that belong to one replica of an expert."""

    replica_id: str
    num_rows: int


@dataclass(frozen=True)
class HostRequest:
    """One batch's rows for one expert host.

    Attributes:
        ticket: Unique among the requests of one router process; comes back in the reply.
        segments: Whose rows are in ``rows``, in order.
        rows: ``(sum of num_rows, *item_shape)``, contiguous.
        timeout_s: How long the router waits for the reply; a host may skip what is already too late.
    """

    ticket: int
    segments: tuple[Segment, ...]
    rows: Tensor
    timeout_s: float


@dataclass(frozen=True)
class SegmentResult:
    """How one segment went at the host.

    Attributes:
        replica_id: The segment's.
        num_rows: The segment's.
        error: None, or what went wrong in words; then the reply holds no rows of this segment.
        compute_ms: Time that the expert took over these rows, with those of other requests in the same product.
    """

    replica_id: str
    num_rows: int
    error: str | None = None
    compute_ms: float = 0.0


@dataclass(frozen=True)
class HostReply:
    """A host's answer to one ``HostRequest``.

    Attributes:
        ticket: The request's.
        results: One per segment, in the request's order.
        rows: Output rows of the segments without error, in order, ``(num_ok_rows, *out_shape)``; None if none.
    """

    ticket: int
    results: tuple[SegmentResult, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class HostLost:
    """The host of an endpoint is gone: nothing more will come from this incarnation."""

    endpoint: Endpoint
    reason: str


class Transport(Protocol):
    """The router's end. Owned by one thread; only ``wake`` may be called from others.

    Guarantees: a request reaches the incarnation it is addressed to or nobody; ``poll`` returns a reply at
    most once per ticket sent, in any order, and none that another process was meant to get. There is no
    guarantee that a reply comes: callers keep their own time.
    """

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        """Hand a request to the transport without blocking.

        Raises:
            TransportError: If the endpoint cannot be reached or its queue is full.
        """
        ...

    def poll(self, timeout_s: float) -> list[HostReply | HostLost]:
        """Whatever has arrived; waits up to ``timeout_s`` for the first, and returns early on ``wake``."""
        ...

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Close the connections to all endpoints but these, and open none."""
        ...

    def wake(self) -> None:
        """Make a ``poll`` that is waiting, or the next one, return at once. Thread-safe."""
        ...

    def close(self) -> None:
        """Close every connection; queued messages are discarded. Safe to call twice."""
        ...


@dataclass(frozen=True)
class Delivery:
    """A request that arrived at a host, and whom to answer."""

    sender: bytes
    request: HostRequest


class HostTransport(Protocol):
    """The expert host's end. Owned by one thread; only ``wake`` may be called from others."""

    @property
    def endpoint(self) -> Endpoint:
        """Where routers find this host."""
        ...

    def receive(self, timeout_s: float) -> list[Delivery]:
        """All requests that have arrived; waits up to ``timeout_s`` for the first; returns early on ``wake``."""
        ...

    def reply(self, delivery: Delivery, reply: HostReply) -> None:
        """Answer a delivery without blocking; an answer to a router that is gone is discarded and counted."""
        ...

    def wake(self) -> None:
        """Make a ``receive`` that is waiting, or the next one, return at once. Thread-safe."""
        ...

    def close(self) -> None:
        """Stop listening; queued messages are discarded. Safe to call twice."""
        ...
