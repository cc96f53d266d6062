"""Whether routers can bind their addresses, asked before anything starts."""

from __future__ import annotations

import errno
import socket

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.addresses import router_addresses, split_address

_FAULTS = {
    errno.EADDRINUSE: "expected a free port, found it taken by another process",
    errno.EADDRNOTAVAIL: "expected an address to bind, found one that is not an address of this machine",
}


def check_ports(address: str, count: int) -> None:
    """Bind the address of every router for a moment; for routers that will run on this machine.

    Args:
        address: ``HOST:PORT`` of the first router; the i-th takes port + i; port 0 is any.
        count: Number of routers.

    Raises:
        ConfigError: If a port is above 65535.
        StartError: If an address cannot be bound; one line per address, with the reason.
    """
    faults = {each: _fault(each) for each in router_addresses(address, [""] * count)}
    lines = [f"router.address {each}: {fault}" for each, fault in faults.items() if fault is not None]
    if lines:
        raise StartError("\n".join(lines))


def _fault(address: str) -> str | None:
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return "expected an address to bind, found that the name does not resolve"
    errors = [_bind_error(family, place) for family, _, _, _, place in found]
    # One is enough: gRPC binds those that it can, and localhost may stand for ::1 on a machine without IPv6.
    if None in errors:
        return None
    error = next((error for error in errors if error is not None and error.errno == errno.EADDRINUSE), errors[0])
    return None if error is None else _FAULTS.get(error.errno or 0, f"cannot be bound: {error.strerror}")


def _bind_error(family: int, place: tuple[object, ...]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections of an earlier server that linger do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as exc:
        return exc
    return None
