"""The addresses of this machine's interfaces, and the one that lies in a network."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Linux: asks for the IPv4 addresses of all interfaces.
_SIOCGIFCONF = 0x8912
_NUM_NAME_BYTES, _NUM_ENTRY_BYTES, _MAX_ENTRIES = 16, 40, 1024
_IPV6_TABLE = Path("/proc/net/if_inet6")


def address_in(network: str, *, known: str, node: str, addresses: Iterable[str] | None = None) -> str:
    """The address that a node has in a network.

    Args:
        network: In CIDR notation.
        known: The address that the cluster knows the node by; taken if it lies in the network.
        node: Name of the node, for the message.
        addresses: All addresses of the node; this machine's when None.

    Raises:
        StartError: If the node has no address in the network.
    """
    wanted = ipaddress.ip_network(network)
    found = sorted(map(ipaddress.ip_address, interface_addresses() if addresses is None else addresses), key=str)
    inside = [str(address) for address in found if address in wanted]
    if known in inside:
        return known
    if not inside:
        raise StartError(
            f"data_plane.network: expected node {node} to have an address in {network}, "
            f"found {', '.join(map(str, found)) or 'none'}"
        )
    return inside[0]


def interface_addresses() -> tuple[str, ...]:
    """Every address of this machine's interfaces."""
    return (*_ipv4_addresses(), *_ipv6_addresses())


def _ipv4_addresses() -> list[str]:
    entries = array.array("B", bytes(_MAX_ENTRIES * _NUM_ENTRY_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(entries), entries.buffer_info()[0])
        num_bytes = struct.unpack("iL", fcntl.ioctl(probe, _SIOCGIFCONF, request))[0]
    # Of each entry: the interface's name, the family and port of a socket address, then the address.
    starts = range(_NUM_NAME_BYTES + 4, num_bytes, _NUM_ENTRY_BYTES)
    return [socket.inet_ntoa(entries[start : start + 4].tobytes()) for start in starts]


def _ipv6_addresses() -> list[str]:
    if not _IPV6_TABLE.exists():
        return []
    lines = _IPV6_TABLE.read_text(encoding="ascii").splitlines()
    return [str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in lines]
