"""``moe-runtime status --watch``: the tables again and again, with rates between two looks."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.text import Text

from moe_runtime.cli.router_views import RouterView, ask_each
from moe_runtime.cli.status_rates import Rates
from moe_runtime.cli.status_tables import status_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

    from moe_runtime.cli.connections import Connection
    from moe_runtime.cli.router_views import Silence


@dataclass(frozen=True)
class Look:
    """What the routers said, and when."""

    at: float
    routers: tuple[RouterView | Silence, ...]

    @property
    def answering(self) -> tuple[RouterView, ...]:
        """Those that said something."""
        return tuple(router for router in self.routers if isinstance(router, RouterView))


def looks(
    ask: Callable[[], tuple[RouterView | Silence, ...]], *, every_s: float, wait: Callable[[float], object]
) -> Iterator[Look]:
    """A look at the routers every ``every_s``, for ever; the first one at once."""
    while True:
        started_at = time.monotonic()
        yield Look(time.monotonic(), ask())
        wait(max(0.0, started_at + every_s - time.monotonic()))


def watch(
    addresses: tuple[str, ...], *, timeout_s: float, every_s: float, connection: Connection, console: Console
) -> None:
    """Show the routers until SIGINT: in place on a terminal, else one set of tables after the other."""
    # An event that nobody sets: its wait ends with an interrupt at once, and with nothing else.
    wait = threading.Event().wait
    ask = partial(ask_each, addresses, timeout_s=timeout_s, connection=connection)
    try:
        show(looks(ask, every_s=every_s, wait=wait), console=console)
    except KeyboardInterrupt:
        return


def show(each: Iterator[Look], *, console: Console) -> None:
    """Show these looks as they come."""
    before: Look | None = None
    if not console.is_terminal:
        for look in each:
            console.print(page(look, before))
            before = look
        return
    with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        for look in each:
            live.update(page(look, before), refresh=True)
            before = look


def page(look: Look, before: Look | None) -> RenderableType:
    """One look as tables, under the time of day and the rates since the look before."""
    rates = None if before is None else Rates.between(before.answering, look.answering, seconds=look.at - before.at)
    line = Text(time.strftime("%H:%M:%S"), style="dim")
    if rates is not None:
        line.append(f"  {rates.tokens_per_s:,.0f} tokens/s  {rates.assignments_per_s:,.0f} assignments/s")
        line.append(f"  {rates.requests_per_s:,.0f} requests/s")
    return Group(line, *status_tables(look.routers))
