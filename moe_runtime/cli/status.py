"""``moe-runtime status``: what the routers say of themselves, as tables or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moe_runtime.cli.router_views import ask_routers
from moe_runtime.cli.status_tables import runtime_tables, status_tables

if TYPE_CHECKING:
    from rich.console import Console

    from moe_runtime.cli.connections import Connection
    from moe_runtime.cli.router_views import RouterView


def show_routers(
    addresses: tuple[str, ...], *, timeout_s: float, connection: Connection, as_json: bool, console: Console
) -> None:
    """Print what routers say of themselves.

    Raises:
        UnavailableError: If one of them does not answer.
        MoERuntimeError: If one answers with an error.
    """
    routers = ask_routers(addresses, timeout_s=timeout_s, connection=connection)
    if as_json:
        print_json(routers, console=console)
    else:
        print_tables(routers, console=console)


def print_json(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print everything that the routers say, as one JSON document."""
    document = {"routers": [vars(router) for router in routers]}
    console.print(json.dumps(document, indent=2), markup=False, soft_wrap=True)


def show_runtime(name: str, *, ray_address: str | None, as_json: bool, console: Console) -> None:
    """Print what a runtime's controller says of it; of one without routers nobody else knows more.

    Raises:
        StartError: If there is no such cluster, or no runtime of this name on it.
    """
    from moe_runtime.launch.runtime import attach

    with attach(name, ray_address=ray_address) as runtime:
        description = runtime.describe()
    if as_json:
        console.print(json.dumps(description, indent=2), markup=False, soft_wrap=True)
        return
    for table in runtime_tables(description):
        console.print(table)


def print_tables(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print the routers, then each layer with its experts; counters are sums over the routers."""
    for table in status_tables(routers):
        console.print(table)
