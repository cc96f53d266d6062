"""What both ends of the gRPC edge agree on: names of methods, metadata keys, message sizes, channel options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "moe_runtime.v1.Router"
FORWARD = "Forward"
FORWARD_STREAM = "ForwardStream"
DESCRIBE = "Describe"
STATUS = "Status"

#: Metadata of a call: ``Bearer TOKEN``.
AUTHORIZATION_KEY = "authorization"
#: Trailing metadata of a call that failed: the error's class name, and when to try again.
ERROR_KEY = "moe-error"
RETRY_AFTER_KEY = "moe-retry-after-ms"

_MIB = 1 << 20
#: A longer body goes through ``ForwardStream``, in slices.
UNARY_BYTES = 4 * _MIB + (64 << 10)
SLICE_BYTES = _MIB

_SIZE_OPTIONS = (
    ("grpc.max_receive_message_length", UNARY_BYTES),
    ("grpc.max_send_message_length", UNARY_BYTES),
)
_MAX_PENDING_CALLS = 1 << 20
_HANDSHAKE_TIMEOUT_MS = 10_000
SERVER_OPTIONS = (
    *_SIZE_OPTIONS,
    # Connections on which nothing is said are not for keeps.
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
    # Above these gRPC would cancel calls at random, without a word; the router refuses them with an error instead.
    ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
    ("grpc.so_reuseport", 0),  # else two servers share one port without either noticing
    ("grpc.http2.min_ping_interval_without_data_ms", 100),  # lets the clients' keepalive pass
)
CHANNEL_OPTIONS = (
    *_SIZE_OPTIONS,
    ("grpc.enable_retries", 0),  # the client retries by itself, under its own budget
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A router that falls silent is given up in time for another one to answer within a second: after 0.75 s where
    # calls are under way, after 0.8 s where the connection has yet to be made. gRPC's own threads answer these
    # questions, however busy the router's are.
    ("grpc.keepalive_time_ms", 250),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.http2.ping_timeout_ms", 500),  # else a ping that the other end's kernel has taken waits for a minute
    ("grpc.http2.max_pings_without_data", 0),  # any number: a call may take long
    ("grpc.min_reconnect_backoff_ms", 800),  # bounds an attempt to connect, too
)


def path(method: str) -> str:
    """The method's full name on the wire."""
    return f"/{SERVICE}/{method}"


def slices(body: bytes) -> Iterator[bytes]:
    """The body in consecutive slices of at most ``SLICE_BYTES``, as a stream carries it."""
    for start in range(0, len(body), SLICE_BYTES):
        yield body[start : start + SLICE_BYTES]
