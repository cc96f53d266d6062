"""Certificates for development and small installations: a CA of one's own, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moe_runtime.errors import ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: Clocks differ; a certificate is good a little before it is made.
_EARLIER = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class CertificateFiles:
    """Where the files are that ``make_certificates`` writes, all of them PEM."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's certificate, which clients trust, and routers for mutual TLS."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The CA's key: whoever has it makes certificates that are believed. Neither routers nor clients need it."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """The routers' certificate."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """The routers' key."""
        return self.folder / "server.key"

    @property
    def client(self) -> Path:
        """A client's certificate, for mutual TLS."""
        return self.folder / "client.crt"

    @property
    def client_key(self) -> Path:
        """The client's key."""
        return self.folder / "client.key"

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.ca, self.ca_key, self.server, self.server_key, self.client, self.client_key)


@dataclass(frozen=True)
class _Issued:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(
    folder: Path, *, hosts: Sequence[str] = (), days: int = 365, client_name: str = "moe-runtime-client"
) -> CertificateFiles:
    """Make a CA, a certificate for routers and one for a client, each with a P-256 key.

    Args:
        folder: Where to; made if need be, for its owner only.
        hosts: Names and addresses that routers are called by, beside those of the machine itself.
        days: How long they are good for.
        client_name: The client's common name, which routers know it by.

    Raises:
        ConfigError: If a host is neither a name nor an address.
        StartError: If one of the files is there already, or one cannot be written. Nothing is overwritten.
    """
    files = CertificateFiles(folder)
    there = [str(path) for path in files.paths if path.exists()]
    if there:
        raise StartError(f"expected to make new files, found {', '.join(there)}; choose another folder, or move them")
    names = [_general_name(host) for host in dict.fromkeys((*LOCAL_NAMES, *hosts))]
    period = datetime.timedelta(days=days)
    ca = _issue("moe-runtime development CA", period, ca=None)
    server = _issue("moe-runtime router", period, ca=ca, names=names)
    client = _issue(client_name, period, ca=ca)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for issued, certificate, key in (
            (ca, files.ca, files.ca_key),
            (server, files.server, files.server_key),
            (client, files.client, files.client_key),
        ):
            _write(key, _key_pem(issued.key), mode=0o600)
            _write(certificate, issued.certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    except OSError as exc:
        raise StartError(f"{folder}: expected to write certificates there, found: {exc}") from exc
    return files


def _issue(
    common_name: str, period: datetime.timedelta, *, ca: _Issued | None, names: Sequence[x509.GeneralName] = ()
) -> _Issued:
    """A certificate: a CA's own where there is none to sign it, a server's where it has names, else a client's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    issuer_key = key if ca is None else ca.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if ca is None else ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + period)
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=0 if ca is None else None), critical=True)
        .add_extension(_key_usage(is_ca=ca is None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca is not None:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return _Issued(builder.sign(issuer_key, hashes.SHA256()), key)


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        if not host or host.strip() != host or ":" in host or "/" in host:
            raise ValueError("it is neither a name nor an address")
        return x509.DNSName(host)
    except ValueError as exc:
        raise ConfigError(f"host: expected a name or an address without port, found {host!r}: {exc}") from exc


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, *, mode: int) -> None:
    # Exclusive, and never readable by others, not even for a moment.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
