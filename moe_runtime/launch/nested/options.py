"""The options of the kinds ``moe`` and ``remote``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from moe_runtime.config.security import TOKEN_PATTERN
from moe_runtime.config.strict import MAX_SECONDS, Name, StrictModel
from moe_runtime.errors import InnerLayerError, InvalidRequestError
from moe_runtime.rpc.balancing import addresses_of
from moe_runtime.rpc.channels import ClientTLS, is_here

_MAX_TIMEOUT_MS = MAX_SECONDS * 1000


class AccessOptions(StrictModel):
    """How an expert calls the routers of its layer. Paths are of the expert's node; `~` is the home there."""

    timeout_ms: float | None = Field(
        None,
        gt=0,
        le=_MAX_TIMEOUT_MS,
        description="How long one call may take; never more than nine tenths of what its batch has left.",
    )
    token_env: str | None = Field(
        None, min_length=1, description="Variable in the environment of the expert's actor that holds the token."
    )
    token_file: str | None = Field(
        None, min_length=1, description="File that holds the token alone; read again when the token is refused."
    )
    tls: bool = Field(False, description="Call by TLS, and trust the usual CAs where `ca` names no others.")
    ca: str | None = Field(None, description="A PEM file: certificates of the CAs to trust; calls go by TLS.")
    cert: str | None = Field(None, description="A PEM file: the expert's certificate, for routers that want one.")
    key: str | None = Field(None, description="A PEM file: the certificate's key.")
    server_name: str | None = Field(
        None,
        min_length=1,
        description="The name to expect in the routers' certificates, instead of the address's host.",
    )
    insecure: bool = Field(False, description="Send the token in plain text to other machines, too.")

    @model_validator(mode="after")
    def _one_token(self) -> AccessOptions:
        if self.token_env is not None and self.token_file is not None:
            raise ValueError("expected token_env or token_file, found both")
        return self

    @model_validator(mode="after")
    def _whole_certificate(self) -> AccessOptions:
        if (self.cert is None) != (self.key is None):
            raise ValueError("expected both cert and key, or neither, found one of them")
        if not self.uses_tls and (self.cert is not None or self.server_name is not None):
            raise ValueError("cert, key and server_name: expected them with TLS only, found neither tls nor ca")
        return self

    @property
    def has_token(self) -> bool:
        """Whether calls show a token."""
        return self.token_env is not None or self.token_file is not None

    @property
    def uses_tls(self) -> bool:
        """Whether calls go by TLS."""
        return self.tls or self.ca is not None

    def client_tls(self) -> ClientTLS | None:
        """How a client uses TLS; None where it does not."""
        if not self.uses_tls:
            return None
        return ClientTLS(ca=self.ca, cert=self.cert, key=self.key, server_name=self.server_name)

    def read_token(self) -> str:
        """The token; empty where none is shown.

        Raises:
            InnerLayerError: If it is not where the options say, or is none; never with the token itself.
        """
        if self.token_env is not None:
            place, token = f"the variable {self.token_env}", os.environ.get(self.token_env, "")
        elif self.token_file is not None:
            place = str(self.token_file)
            try:
                token = Path(self.token_file).expanduser().read_text(encoding="ascii").strip()
            except (OSError, UnicodeError) as exc:
                raise InnerLayerError(f"expected a token in {place}, found {type(exc).__name__}") from None
        else:
            return ""
        if not re.fullmatch(TOKEN_PATTERN, token):
            raise InnerLayerError(f"expected a token of 16 to 4096 visible ASCII characters in {place}, found none")
        return token


class RemoteOptions(AccessOptions):
    """A layer of another runtime, which has its own routers and experts."""

    target: str | list[str] = Field(description="`HOST:PORT` of a router, or of several, which take turns.")
    layer: Name = Field(description="The layer's name there.")
    out_shape: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Shape of its output rows; the input's when not given. Compared with what its routers say."
    )

    @field_validator("target")
    @classmethod
    def _addresses(cls, target: str | list[str]) -> str | list[str]:
        try:
            addresses_of(target)
        except InvalidRequestError as exc:
            raise ValueError(str(exc).removeprefix("target: ")) from exc
        return target

    @model_validator(mode="after")
    def _token_stays_secret(self) -> RemoteOptions:
        elsewhere = [address for address in self.addresses if not is_here(address)]
        if self.has_token and elsewhere and not (self.uses_tls or self.insecure):
            raise ValueError(
                f"expected tls or ca, since the token would go to {elsewhere[0]} in plain text, found neither; "
                "`insecure: true` sends it all the same"
            )
        return self

    @property
    def addresses(self) -> tuple[str, ...]:
        """The routers."""
        return addresses_of(self.target)


class MoEOptions(AccessOptions):
    """Another layer of this runtime, with its own gate, experts and actors."""

    layer: Name = Field(description="The layer's name.")
    out_shape: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Shape of its output rows; known from the layer, and to be the same where it is given."
    )
