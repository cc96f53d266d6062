"""``moe-runtime upgrade``: rolls a runtime to another configuration, and says what that changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.cli.deploying import expect_one, print_json, showing_progress
from moe_runtime.launch.deploy import DeployOptions, upgrade
from moe_runtime.launch.remote import upgrade_from_afar

if TYPE_CHECKING:
    from rich.console import Console

    from moe_runtime.cli.deploying import Asked
    from moe_runtime.ray_backend.roll import Upgraded


def upgrade_and_report(asked: Asked, *, as_json: bool) -> None:
    """Roll the runtime of the configuration's name to it.

    Raises:
        ConfigError: If the configuration cannot work, or changes what cannot change in a runtime that runs.
        StartError: If something did not start; the runtime serves as before.
    """
    expect_one(asked.cluster, asked.ray_address)
    with showing_progress(f"Upgrading to {asked.config.name}", as_json=as_json) as progress:
        options = DeployOptions(
            install=asked.install, wheel=asked.wheel, on_step=progress.step, on_progress=progress.actors
        )
        if asked.cluster is not None:
            outcome = upgrade_from_afar(asked.config, cluster=asked.cluster, options=options)
        else:
            outcome = upgrade(asked.config, ray_address=asked.ray_address, options=options)
    if as_json:
        print_json(asdict(outcome))
    else:
        print_outcome(outcome, console=stdout_console())


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
