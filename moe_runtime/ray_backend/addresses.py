"""Which address each router binds."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_PORT = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host keeps its brackets."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only the same machine reaches this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def router_addresses(address: str, nodes: Sequence[str]) -> list[str]:
    """The address of each router, given the node that it is on: the i-th on a node takes port + i.

    Args:
        address: ``HOST:PORT`` of the first router on a node; port 0 is any.
        nodes: Name of each router's node.

    Raises:
        ConfigError: If a loopback address would have to serve several nodes, or a port is above 65535.
    """
    host, port = split_address(address)
    if is_loopback(host) and len(set(nodes)) > 1:
        raise ConfigError(
            f"router.address: expected one that other nodes reach, since the routers are on "
            f"{len(set(nodes))} nodes; found the loopback address {address}"
        )
    addresses = []
    for index, node in enumerate(nodes):
        nth = nodes[:index].count(node)
        if port and port + nth > _MAX_PORT:
            raise ConfigError(f"router.address: port {port} + {nth} is above {_MAX_PORT}; choose a lower one")
        addresses.append(f"{host}:{port + nth if port else 0}")
    return addresses


def public_address(bound: str, ip: str) -> str:
    """The address that clients use: where every interface is bound, the node's own."""
    host, port = split_address(bound)
    return f"{ip}:{port}" if host in ("0.0.0.0", "[::]") else bound
