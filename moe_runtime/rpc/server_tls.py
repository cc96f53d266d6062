"""The certificates of a router's server, which may be replaced while it runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from moe_runtime.errors import ConfigError
from moe_runtime.rpc.reloading import Reloaded, read_private

if TYPE_CHECKING:
    from moe_runtime.config.security import TLSConfig


@dataclass(frozen=True)
class _Certificates:
    """What a server shows, and whose certificates it accepts: PEM."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], root_certificates=self.client_ca)


def server_credentials(tls: TLSConfig) -> grpc.ServerCredentials:
    """Credentials that follow their files: each new connection gets the newest certificate that fits its key.

    Raises:
        ConfigError: If a file cannot be read, a key fits no certificate or may be read by others than its owner.
    """
    files = Reloaded(
        [Path(path).expanduser() for path in (tls.cert, tls.key, tls.client_ca) if path is not None],
        lambda: _read(tls),
    )
    shown = files.current()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        current = files.current()
        if current is shown:
            return None
        shown = current
        return current.configuration()

    return grpc.dynamic_ssl_server_credentials(
        shown.configuration(), newer, require_client_authentication=tls.client_ca is not None
    )


def _read(tls: TLSConfig) -> _Certificates:
    cert, key = Path(tls.cert).expanduser(), Path(tls.key).expanduser()
    read = _Certificates(
        cert=_read_public(cert),
        key=read_private(key),
        client_ca=None if tls.client_ca is None else _read_public(Path(tls.client_ca).expanduser()),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # gRPC would refuse connection after connection, and not say why. No password: nobody is there to be asked.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{cert}, {key}: expected a PEM certificate and its unencrypted key, found: {exc}") from exc
    if read.client_ca is not None:
        try:
            context.load_verify_locations(cadata=read.client_ca.decode("ascii"))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{tls.client_ca}: expected PEM certificates of CAs, found: {exc}") from exc
    return read


def _read_public(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: expected a file, found: {exc.strerror}") from exc
