"""``moe-runtime status``: what the routers say of themselves, as tables or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moe_runtime.cli.status_tables import status_tables

if TYPE_CHECKING:
    from rich.console import Console

    from moe_runtime.cli.router_views import RouterView


def print_json(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print everything that the routers say, as one JSON document."""
    document = {"routers": [vars(router) for router in routers]}
    console.print(json.dumps(document, indent=2), markup=False, soft_wrap=True)


def print_tables(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print the routers, then each layer with its experts; counters are sums over the routers."""
    for table in status_tables(routers):
        console.print(table)
