"""``moe-runtime upgrade``: rolls a runtime to another configuration, and says what that changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.launch.runtime import upgrade

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from moe_runtime.ray_backend.roll import Upgraded


def upgrade_and_report(config: Path, *, ray_address: str | None) -> None:
    """Roll the runtime of the configuration's name to it.

    Raises:
        ConfigError: If the configuration cannot work, or changes what cannot change in a runtime that runs.
        StartError: If something did not start; the runtime serves as before.
    """
    console = stdout_console()
    with console.status(f"Upgrading to {config.name}") as upgrading:

        def show(num_ready: int, num_actors: int) -> None:
            upgrading.update(f"Upgrading to {config.name}: {num_ready} of {num_actors} actors are ready")

        outcome = upgrade(config, ray_address=ray_address, on_progress=show)
    print_outcome(outcome, console=console)


def print_outcome(outcome: Upgraded, *, console: Console) -> None:
    """Say what an upgrade has done."""
    if outcome.is_nothing:
        console.print("nothing to do: the runtime serves this configuration", markup=False)
        return
    changes = {"added": outcome.added, "replaced": outcome.replaced, "removed": outcome.removed}
    for what, hosts in changes.items():
        if hosts:
            console.print(f"{what:9} {', '.join(hosts)}", markup=False, soft_wrap=True)
    kept, routers = _number(len(outcome.kept), "expert host"), _number(outcome.num_routers, "router")
    console.print(f"upgraded: {kept} kept, {routers}", markup=False)


def _number(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"
