"""Secured routers for tests: tokens in files, certificates of the package's own, and raw HTTP/2 for bad callers."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fakes.live_router import WIDTH
from moe_runtime.config.security import SecurityConfig, TLSConfig
from moe_runtime.rpc.certificates import CertificateFiles
from moe_runtime.rpc.channels import ClientTLS
from moe_runtime.rpc.client import MoEClient

ALICE, BOB, OLD, METRICS = (f"{name}-{'x' * 20}" for name in ("alice", "bob", "old", "metrics"))
ENTRIES: list[dict[str, Any]] = [
    {"name": "alice", "token": ALICE, "scopes": ["infer"]},
    {"name": "bob", "token": BOB, "scopes": ["infer", "admin"]},
    {"name": "old", "token": OLD, "scopes": ["infer"], "expires": "2020-01-31"},
    {"name": "scraper", "token": METRICS, "scopes": ["metrics"]},
]
ROWS = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


def write_tokens(path: Path, entries: Any = ENTRIES, *, mode: int = 0o600) -> Path:
    """A file of tokens; replaced at once, as an operator should."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    part.chmod(mode)
    part.replace(path)
    return path


def tls_config(files: CertificateFiles, *, mutual: bool = False) -> SecurityConfig:
    client_ca = str(files.ca) if mutual else None
    return SecurityConfig(tls=TLSConfig(cert=str(files.server), key=str(files.server_key), client_ca=client_ca))


def expect_good_request(address: str, *, token: str | None = None, tls: ClientTLS | None = None) -> None:
    """Whatever was tried before, the router still answers one who may call it."""
    with MoEClient(address, token=token, tls=tls) as client:
        np.testing.assert_allclose(client.forward(ROWS, layer="vectors", timeout_s=20).outputs, ROWS, rtol=1e-6)


def exchange_raw(address: str, sent: bytes) -> bytes:
    """What a server says to these bytes until it closes the connection, or has said nothing more for a while."""
    host, _, port = address.rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        connection.settimeout(2)
        try:
            while piece := connection.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def raw_call(method: str, headers: dict[bytes, bytes]) -> bytes:
    """An HTTP/2 connection's first bytes with one gRPC call, whose headers no library has checked."""
    pseudo = {b":method": b"POST", b":scheme": b"http", b":path": method.encode(), b":authority": b"localhost"}
    fixed = {b"te": b"trailers", b"content-type": b"application/grpc"}
    block = b"".join(_literal(name, value) for name, value in (pseudo | fixed | headers).items())
    end_headers, end_stream = 0x4, 0x1
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(0x4, 0, 0, b"")
        + _frame(0x1, end_headers, 1, block)
        + _frame(0x0, end_stream, 1, b"\0\0\0\0\0")
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """HPACK's literal header field without indexing, new name (RFC 7541, section 6.2.2)."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)])
    rest, encoded = len(text) - 127, b"\x7f"
    while rest >= 128:
        encoded += bytes([rest % 128 + 128])
        rest //= 128
    return encoded + bytes([rest])
