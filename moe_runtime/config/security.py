"""The configuration of who may call the routers, and of what others on the network can read of it."""

from __future__ import annotations

import datetime  # pydantic evaluates the annotation
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from moe_runtime.config.strict import Name, StrictModel

if TYPE_CHECKING:
    from pathlib import Path

#: What a token lets its owner do: run layers, change a runtime, read metrics.
Scope = Literal["infer", "admin", "metrics"]
#: A token is sent in an HTTP header: visible ASCII only. Shorter ones could be guessed.
TOKEN_PATTERN = r"^[\x21-\x7e]{16,4096}$"  # nosec B105  # what tokens look like


class TLSConfig(StrictModel):
    """The certificates of the routers' gRPC servers; replaced files are used from the next connection on."""

    cert: str = Field(description="A PEM file: the routers' certificate, and after it those between it and its CA.")
    key: str = Field(description="A PEM file: the certificate's key, unencrypted, readable by its owner only.")
    client_ca: str | None = Field(
        None, description="A PEM file: clients have to show a certificate of one of these CAs (mutual TLS)."
    )


class SecurityConfig(StrictModel):
    """Who may call the routers, and how. The files are on the routers' nodes; `~` is the home there."""

    tls: TLSConfig | None = Field(
        None, description="Encrypts calls. Without it, `router.address` has to be a loopback address."
    )
    tokens: str | None = Field(
        None,
        description="A YAML or JSON file with the tokens of those who may call, readable by its owner only; changes "
        "count within a second. Without it, whoever reaches a router may call it.",
    )
    insecure: bool = Field(
        False, description="Plain text, tokens included, on addresses that other machines reach: for networks of trust."
    )

    def located(self, base_dir: Path) -> SecurityConfig:
        """The same with paths that start at ``base_dir`` made absolute; those of ``~`` stay for their node."""

        def at(path: str) -> str:
            return path if path.startswith("~") else str(base_dir / path)

        tls = self.tls
        if tls is not None:
            ca = None if tls.client_ca is None else at(tls.client_ca)
            tls = TLSConfig(cert=at(tls.cert), key=at(tls.key), client_ca=ca)
        return SecurityConfig(tls=tls, tokens=None if self.tokens is None else at(self.tokens), insecure=self.insecure)

    @property
    def files(self) -> dict[str, str]:
        """Every file that the block names, by its key."""
        named = {"security.tokens": self.tokens}
        if self.tls is not None:
            named |= {f"security.tls.{key}": path for key, path in self.tls.model_dump().items()}
        return {key: path for key, path in named.items() if path is not None}


class TokenConfig(StrictModel):
    """One entry of the tokens' file."""

    name: Name = Field(description="Who has it; in logs, and one queue share per name.")
    token: Annotated[str, Field(pattern=TOKEN_PATTERN)] | None = Field(None, description="The token itself.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = Field(
        None, description="Or its SHA-256, in hex."
    )
    scopes: list[Scope] = Field(min_length=1, description="What it is good for.")
    expires: datetime.date | None = Field(None, description="Its last day, in UTC; it does not expire when null.")

    @model_validator(mode="after")
    def _token_or_hash(self) -> TokenConfig:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("expected token or sha256, one of them")
        return self
