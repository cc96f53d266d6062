"""``moe-runtime certs``: certificates, and what to write where to use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.rpc.certificates import make_certificates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console


def make_and_explain(folder: Path, *, hosts: Sequence[str], days: int, console: Console) -> None:
    """Make certificates and print the configuration and the client that use them.

    Raises:
        ConfigError: If a host is neither a name nor an address.
        StartError: If a file is there already, or cannot be written.
    """
    files = make_certificates(folder.absolute(), hosts=hosts, days=days)
    lines = (
        f"made a CA, a certificate for routers and one for a client in {files.folder}, good for {days} days",
        "",
        "the configuration; client_ca makes clients show a certificate, too:",
        "",
        "  security:",
        f"    tls: {{cert: {files.server}, key: {files.server_key}, client_ca: {files.ca}}}",
        "",
        "the client:",
        "",
        f'  tls = moe_runtime.ClientTLS(ca="{files.ca}", cert="{files.client}", key="{files.client_key}")',
        "  moe_runtime.MoEClient(ADDRESS, tls=tls)",
        "",
        f"keep {files.ca_key} to yourself: whoever has it can pass for a router or a client",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
