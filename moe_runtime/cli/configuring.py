"""The commands about a configuration that start nothing; what they do loads when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.consoles import stdout_console

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The runtime's YAML file.", show_default=False)]


def validate(
    config: ConfigPath,
    *,
    expand: Annotated[
        bool, typer.Option("--expand", help="Print it as plain YAML, with the keys of its presets written out.")
    ] = False,
) -> None:
    """Check a configuration, its plug-ins and its weights without starting anything."""
    from moe_runtime.cli.validation import print_expanded, print_summary
    from moe_runtime.launch.build import validate as check

    summary = check(config)
    if expand:
        print_expanded(config, console=stdout_console())
    else:
        print_summary(summary, config=config, console=stdout_console())


def plan(
    config: ConfigPath,
    *,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="NODES.yaml", help="A list of nodes or a file for ray up, instead of nodes that are there."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The Ray cluster to look at; else RAY_ADDRESS; else this machine."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the whole plan to this file.")
    ] = None,
) -> None:
    """Show where each expert would go, the memory, load and traffic, and refuse what cannot fit."""
    from moe_runtime.cli.plan import show_plan

    show_plan(config, cluster=cluster, ray_address=ray_address, json_path=json_path, console=stdout_console())


def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show everything about this one.", show_default=False)
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the systems of the literature that a layer's `preset` can name."""
    from moe_runtime.cli.presets import print_json, print_preset, print_table
    from moe_runtime.config.presets.catalogue import PRESETS, find_preset

    chosen = None if name is None else find_preset(name)
    if as_json:
        print_json(PRESETS.values() if chosen is None else (chosen,), console=stdout_console())
    elif chosen is None:
        print_table(PRESETS.values(), console=stdout_console())
    else:
        print_preset(chosen, console=stdout_console())
