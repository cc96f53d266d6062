"""The ports of the service: what it asks of a clock and of whatever carries rows to experts and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from _typeshed import DataclassInstance
    from torch import Tensor


MAX_REPLICA_ID_CHARACTERS = 255

#: What a decoder of these values checks; their constructors trust the code that calls them.
NaturalNumber = Annotated[int, msgspec.Meta(ge=0)]
ReplicaId = Annotated[str, msgspec.Meta(max_length=MAX_REPLICA_ID_CHARACTERS)]


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


# Structs, not dataclasses: these are made, hashed or decoded for every message, which msgspec does in C.
class Endpoint(msgspec.Struct, frozen=True, cache_hash=True):
    """Where one expert host listens.

    Attributes:
        incarnation: Random 64-bit number of the host's process; a successor at the same address has another.
        node: Name of the node; routers on it use ``local``.
        local: Address for routers on the same node, or None.
        remote: Address for routers on other nodes, or None.
        public_key: Key that the host proves to own at ``remote``; None where that address is not encrypted.
    """

    incarnation: int
    node: str
    local: str | None = None
    remote: str | None = None
    public_key: str | None = None


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Consecutive rows of a message that belong to one replica of an expert."""

    replica_id: ReplicaId
    num_rows: NaturalNumber


class HostRequest(msgspec.Struct, frozen=True, gc=False):
    """One batch's rows for one expert host.

    Attributes:
        ticket: Unique among the requests of one router process; comes back in the reply.
        segments: Whose rows are in ``rows``, in order.
        rows: ``(sum of num_rows, *item_shape)``, contiguous.
        timeout_s: How long the router waits for the reply; a host may skip what is already too late.
        request_ids: Of the requests that the batch was joined from; for logs.
        is_suspect: Whether a host died while it had the one request whose rows these are. It is run by itself, and the
            router is told when that begins: if this host dies too, it is known whether it died of this.
    """

    ticket: int
    segments: tuple[Segment, ...]
    rows: Tensor
    timeout_s: float
    request_ids: tuple[str, ...] = ()
    is_suspect: bool = False


class SegmentResult(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """How one segment went at the host.

    Attributes:
        replica_id: The segment's.
        num_rows: The segment's.
        error: None, or what went wrong in words.
        compute_ms: Time that the expert took over these rows, with those of other requests in the same product.
        failed_rows: Where there is an error: the rows of the segment that it costs, ascending, and not all of them; the
            reply holds zeros for these. Empty: it costs the segment, and the reply holds no rows of it.
        is_expert_error: Whether the expert itself made the error: asked for the same again, it may well make it again.
    """

    replica_id: ReplicaId
    num_rows: NaturalNumber
    error: str | None = None
    compute_ms: float = 0.0
    failed_rows: tuple[NaturalNumber, ...] = ()
    is_expert_error: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether the reply holds rows of this segment."""
        return self.error is None or bool(self.failed_rows)


class HostReply(msgspec.Struct, frozen=True, gc=False):
    """A host's answer to one ``HostRequest``.

    Attributes:
        ticket: The request's.
        results: One per segment, in the request's order.
        rows: Output rows of the segments that have some, in order, ``(num_rows, *out_shape)``; None if none.
        is_begun: It is only a note, without results and rows: the request is with the experts; its answer follows.
    """

    ticket: int
    results: tuple[SegmentResult, ...]
    rows: Tensor | None
    is_begun: bool = False


@dataclass(frozen=True)
class HostLost:
    """The connection to a host has ended, or could not be made: what was sent and not answered is lost.

    Attributes:
        endpoint: The host's.
        reason: Why, in words.
        is_death: Whether its process may have died of what it was sent; not where it is frozen, or was never reached.
    """

    endpoint: Endpoint
    reason: str
    is_death: bool = True


class Transport(Protocol):
    """The router's end. Owned by one thread; only ``wake`` may be called from others.

    Guarantees: a request reaches the incarnation it is addressed to or nobody; ``poll`` returns an answer at
    most once per ticket sent, in any order, and none that another process was meant to get; a note that a request is
    begun comes before its answer, or not at all. There is no
    guarantee that a reply comes: callers keep their own time. A host that dies, freezes or cannot be reached
    gives one ``HostLost``; no reply to what was sent before follows it, and until ``poll`` has returned it no
    request to that host is taken. A request sent afterwards is a new attempt to reach the same incarnation.
    """

    @property
    def public_key(self) -> str | None:
        """Key that hosts must admit before they talk to this router; None if they ask for none."""
        ...

    @property
    def counters(self) -> DataclassInstance:
        """What it has counted so far, whole numbers all. Thread-safe."""
        ...

    def allocate(self, endpoint: Endpoint, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for the rows of one request, from where ``send`` to that endpoint need not copy them.

        It is the caller's until it is sent, or dropped; the reply's rows may come back in it.
        """
        ...

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        """Hand a request to the transport without blocking.

        Its rows must not be changed afterwards; those that ``allocate`` gave must not be read, either, and not
        be sent again.

        Raises:
            TransportError: If the endpoint cannot be reached, is lost, or its queue is full.
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


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A request that arrived at a host, and whom to answer.

    Attributes:
        sender: Whom to answer.
        request: Its rows may lie in memory that is lent for the reply, too: they hold until it is given.
        lease: That memory; the transport's own business.
    """

    sender: bytes
    request: HostRequest
    lease: object = None


class HostTransport(Protocol):
    """The expert host's end. Owned by one thread; only ``admit`` and ``wake`` may be called from others.

    Every delivery is to be answered, those that are too late as well: the answer gives back what the request took
    of the router's credit and of the memory that they share.
    """

    @property
    def endpoint(self) -> Endpoint:
        """Where routers find this host."""
        ...

    def admit(self, public_keys: Collection[str]) -> None:
        """Let routers with these keys connect from other nodes, and no others. Thread-safe.

        Those on the host's node, and those that are connected already, need no key.

        Raises:
            TransportError: If a key is malformed.
        """
        ...

    def receive(self, timeout_s: float) -> list[Delivery]:
        """All requests that have arrived; waits up to ``timeout_s`` for the first; returns early on ``wake``."""
        ...

    def reply(self, delivery: Delivery, reply: HostReply) -> None:
        """Answer a delivery without blocking, or note that it is begun; discarded and counted if the router is gone."""
        ...

    def wake(self) -> None:
        """Make a ``receive`` that is waiting, or the next one, return at once. Thread-safe."""
        ...

    def close(self) -> None:
        """Stop listening; queued messages are discarded. Safe to call twice."""
        ...
