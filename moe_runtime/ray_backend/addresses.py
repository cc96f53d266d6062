"""Which address each router binds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.hosts import is_loopback
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_MAX_PORT = 65535
#: In the place of a host: the address of each router's own node.
NODE_HOST = "node"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host keeps its brackets."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def router_addresses(address: str, nodes: Sequence[str], *, ips: Sequence[str] = ()) -> list[str]:
    """The address of each router, given the node that it is on: the i-th on a node takes port + i.

    Args:
        address: ``HOST:PORT`` of the first router on a node; port 0 is any; the host ``node`` is the node's address.
        nodes: Name of each router's node.
        ips: Address of each router's node; empty where there is no cluster.

    Raises:
        ConfigError: If a loopback address would have to serve several nodes, a port is above 65535, or the host is
            ``node`` where there is no cluster.
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
        bound_host = _host_on(host, ips[index] if ips else None)
        addresses.append(f"{bound_host}:{port + nth if port else 0}")
    return addresses


def next_address(address: str, *, ip: str, taken: Collection[str]) -> str:
    """The address of a router that comes to a node where others are: the first port that none of them has.

    Args:
        address: ``HOST:PORT`` of the first router on a node, as configured.
        ip: The node's address.
        taken: Addresses of the routers that are there.

    Raises:
        ConfigError: If no port is left.
    """
    host, port = split_address(address)
    ports = {split_address(each)[1] for each in taken}
    while port in ports and port:
        port += 1
    if port > _MAX_PORT:
        raise ConfigError(f"router.address: no port up to {_MAX_PORT} is left on {ip}; choose a lower one")
    return f"{_host_on(host, ip)}:{port}"


def is_bindable_on(bound: str, address: str, ip: str) -> bool:
    """Whether an address that a router had can be one on the node of this address, as far as that is known."""
    host, _ = split_address(address)
    return host != NODE_HOST or split_address(bound)[0] == _host_on(host, ip)


def _host_on(host: str, ip: str | None) -> str:
    if host != NODE_HOST:
        return host
    if ip is None:
        raise ConfigError(
            f"router.address: expected an address of this machine, found {NODE_HOST}: "
            "without Ray there are no nodes; write the address"
        )
    return f"[{ip}]" if ":" in ip else ip


def public_address(bound: str, ip: str) -> str:
    """The address that clients use: where every interface is bound, the node's own."""
    host, port = split_address(bound)
    return f"{ip}:{port}" if host in ("0.0.0.0", "[::]") else bound  # nosec B104  # compared, not bound
