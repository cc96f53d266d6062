"""How a client connects: in plain text or by TLS, and with which token."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.security import TOKEN_PATTERN
from moe_runtime.errors import InvalidRequestError
from moe_runtime.rpc.methods import AUTHORIZATION_KEY, CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The token where a client is given none.
TOKEN_VARIABLE = "MOE_RUNTIME_TOKEN"  # nosec B105  # its name


@dataclass(frozen=True)
class ClientTLS:
    """How a client checks its routers' certificates, and what it shows itself. Files are PEM.

    Attributes:
        ca: Certificates of the CAs to trust; None trusts those that gRPC does.
        cert: The client's certificate, for routers that want one.
        key: Its key.
        server_name: The name to expect in the routers' certificates, instead of the address's host.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


@dataclass(frozen=True)
class Connector:
    """Makes a client's channels, and the metadata of its calls.

    Attributes:
        credentials: For TLS; None is plain text.
        metadata: Goes with every call; holds the token.
        server_name: The name to expect in certificates; None is the address's host.
    """

    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    server_name: str | None = None

    def channel(self, address: str) -> grpc.Channel:
        """A channel for ordinary programs."""
        if self.credentials is None:
            return grpc.insecure_channel(address, options=self._options(address))
        return grpc.secure_channel(address, self.credentials, options=self._options(address))

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """A channel for the event loop that runs."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options=self._options(address))
        return grpc.aio.secure_channel(address, self.credentials, options=self._options(address))

    def _options(self, address: str) -> tuple[tuple[str, int | str], ...]:
        options: tuple[tuple[str, int | str], ...] = CHANNEL_OPTIONS
        if self.server_name is not None:
            options = (*options, ("grpc.ssl_target_name_override", self.server_name))
        if is_here(address):
            # A proxy is another machine: neither the call nor its token would stay on this one.
            options = (*options, ("grpc.enable_http_proxy", 0))
        return options


def connector(
    addresses: Sequence[str], *, token: str | None, tls: bool | ClientTLS | None, insecure: bool
) -> Connector:
    """What connects a client to its routers.

    Args:
        addresses: Of the routers.
        token: The client's token; None takes that of ``MOE_RUNTIME_TOKEN``, if there is one; empty is none.
        tls: How to use TLS; True with gRPC's own CAs; None or False is plain text.
        insecure: Whether the token may be sent in plain text to other machines.

    Raises:
        InvalidRequestError: If the token cannot be sent, or would be read by others; or a file cannot be used.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token:
        _check_token(token, addresses, may_be_read=bool(tls) or insecure)
    metadata = ((AUTHORIZATION_KEY, f"Bearer {token}"),) if token else ()
    if not tls:
        return Connector(metadata=metadata)
    tls = ClientTLS() if tls is True else tls
    return Connector(_credentials(tls), metadata, tls.server_name)


def _check_token(token: str, addresses: Sequence[str], *, may_be_read: bool) -> None:
    if not isinstance(token, str) or not re.fullmatch(TOKEN_PATTERN, token):
        raise InvalidRequestError("token: expected 16 to 4096 visible ASCII characters, found something else")
    elsewhere = [address for address in addresses if not is_here(address)]
    if elsewhere and not may_be_read:
        raise InvalidRequestError(
            f"token: expected TLS to {elsewhere[0]}, which is another machine, found plain text; give tls, or "
            "insecure=True to send the token so that others on the way can read it"
        )


def _credentials(tls: ClientTLS) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        raise InvalidRequestError("tls: expected both cert and key, or neither, found one of them")
    return grpc.ssl_channel_credentials(
        root_certificates=_read("tls.ca", tls.ca),
        private_key=_read("tls.key", tls.key),
        certificate_chain=_read("tls.cert", tls.cert),
    )


def _read(what: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise InvalidRequestError(f"{what}: expected a PEM file, found: {path}: {exc.strerror}") from exc


def is_here(address: str) -> bool:
    """Whether an address is of this machine."""
    return is_loopback(address.rpartition(":")[0])
