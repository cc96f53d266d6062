"""How commands that call routers connect to them: the options of TLS and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moe_runtime.rpc.client import MoEClient

TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="PATH", help="A file that holds the token; else MOE_RUNTIME_TOKEN."),
]
CaOption = Annotated[
    Path | None, typer.Option("--ca", metavar="PATH", help="Call by TLS; certificates of the CAs to trust.")
]
CertOption = Annotated[
    Path | None, typer.Option("--cert", metavar="PATH", help="The certificate to show, for mutual TLS.")
]
KeyOption = Annotated[Path | None, typer.Option("--key", metavar="PATH", help="Its key.")]
TlsOption = Annotated[bool, typer.Option("--tls", help="Call by TLS, and trust the usual CAs.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Send the token in plain text to other machines, too.")
]


@dataclass(frozen=True)
class Connection:
    """The options, as ``MoEClient`` takes them.

    Attributes:
        token_file: Holds the token; None takes that of the environment.
        ca: Whom to trust.
        cert: What to show.
        key: Its key.
        tls: Call by TLS, also where none of the files is given.
        insecure: Send the token in plain text.
    """

    token_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    tls: bool = False
    insecure: bool = False

    def client(self, address: str) -> MoEClient:
        """A client that connects in this way.

        Raises:
            ConfigError: If the token cannot be read.
            InvalidRequestError: If a file or the token cannot be used.
        """
        # Here: the module gives the command line its options, and `--help` is to be quick.
        from moe_runtime.rpc.channels import ClientTLS
        from moe_runtime.rpc.client import MoEClient

        uses_tls = self.tls or any((self.ca, self.cert, self.key))
        tls = ClientTLS(ca=self.ca, cert=self.cert, key=self.key) if uses_tls else None
        return MoEClient(address, token=self._token(), tls=tls, insecure=self.insecure)

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        from moe_runtime.rpc.reloading import read_private

        # What is not ASCII, the client refuses.
        return read_private(self.token_file.expanduser()).decode(errors="replace").strip()
