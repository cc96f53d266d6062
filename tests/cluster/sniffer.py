"""Run on a host: looks for a run of bytes in everything that crosses its network link, until a file appears.

Arguments: that file, the bytes in hexadecimal, and ``FIRST-LAST`` of each range of TCP ports. Prints a JSON list with
an object for each range: TCP segments of these ports with payload, and those of them that hold the bytes.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from pathlib import Path

_ALL_PROTOCOLS, _IPV4, _TCP = 3, 0x0800, 6
_ETHERNET_BYTES = 14
_MAX_PACKET_BYTES = 1 << 17


def main() -> None:
    stop, needle = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
    ranges = [tuple(map(int, each.split("-"))) for each in sys.argv[3:]]
    found = [{"segments": 0, "with_bytes": 0} for _ in ranges]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 25)
        link.bind(("eth0", 0))
        link.settimeout(0.1)
        say("listening")
        while not stop.exists():
            try:
                packet = link.recv(_MAX_PACKET_BYTES)
            except TimeoutError:
                continue
            ports, payload = _tcp(packet)
            for (first, last), counts in zip(ranges, found, strict=True):
                if payload and any(first <= port <= last for port in ports):
                    counts["segments"] += 1
                    counts["with_bytes"] += needle in payload
    say(json.dumps(found))


def say(line: str) -> None:
    """Tell whoever started this."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _tcp(packet: bytes) -> tuple[tuple[int, ...], bytes]:
    """Ports and payload of a packet; nothing of one that is not TCP over IPv4."""
    if int.from_bytes(packet[12:14], "big") != _IPV4 or packet[_ETHERNET_BYTES + 9] != _TCP:
        return (), b""
    begin = _ETHERNET_BYTES + (packet[_ETHERNET_BYTES] & 0x0F) * 4
    end = _ETHERNET_BYTES + int.from_bytes(packet[_ETHERNET_BYTES + 2 : _ETHERNET_BYTES + 4], "big")
    header_bytes = (packet[begin + 12] >> 4) * 4
    return struct.unpack(">HH", packet[begin : begin + 4]), packet[begin + header_bytes : end]


if __name__ == "__main__":
    main()
