"""``moe-runtime plan``: where each actor would go, and what that means, before anything starts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from moe_runtime.config.load import load_config
from moe_runtime.errors import PlacementError
from moe_runtime.launch.cluster_file import read_nodes
from moe_runtime.launch.forecast import ClusterView, forecast
from moe_runtime.launch.present_nodes import present_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from moe_runtime.launch.forecast import Forecast


def show_plan(
    config: Path, *, cluster: Path | None, ray_address: str | None, json_path: Path | None, console: Console
) -> None:
    """Print, and write where asked, what a configuration would be on a cluster.

    Raises:
        ConfigError: If the configuration, or the file of nodes, cannot work.
        StartError: If there is an address of a cluster, and nobody answers at it.
        PlacementError: If something has no place or does not fit: after everything was shown, one line for each.
    """
    loaded = load_config(config)
    if cluster is None:
        view = present_nodes(loaded.config, ray_address=ray_address)
    else:
        nodes = read_nodes(cluster)
        view = ClusterView(nodes, home_id=nodes[0].shape.node_id)
    plan = forecast(loaded, view)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(plan), indent=2) + "\n", encoding="utf-8")
    for table in _tables(plan):
        console.print(table)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if plan.mistakes:
        raise PlacementError("\n".join(plan.mistakes))
    console.print(f"{plan.name}: everything has its place", style="green", markup=False, soft_wrap=True)


def _tables(plan: Forecast) -> list[Table]:
    tables = [_actor_table(plan), _device_table(plan), _load_table(plan)]
    return [*tables, _link_table(plan)] if plan.links else tables


def _actor_table(plan: Forecast) -> Table:
    table = _table(f"{plan.name}: where actors go", "actor", "node", "device", right=("weights", "assignments/token"))
    for actor in plan.actors:
        node = "nowhere" if actor.node is None else actor.node
        weights = "" if actor.layer is None else _bytes_text(actor.weights_bytes)
        tokens = "" if actor.layer is None else f"{actor.tokens:.3g}"
        table.add_row(actor.actor_id, node, actor.device, weights, tokens, style="red" if actor.node is None else None)
    return table


def _device_table(plan: Forecast) -> Table:
    table = _table("Memory", "node", "device", right=("weights", "of"))
    for each in plan.devices:
        total = "unknown" if each.total_bytes is None else _bytes_text(each.total_bytes)
        table.add_row(each.node, each.device, _bytes_text(each.weights_bytes), total)
    return table


def _load_table(plan: Forecast) -> Table:
    table = _table("Expected load", "layer", "node", right=("assignments/token",))
    for each in plan.loads:
        table.add_row(each.layer, each.node, f"{each.tokens:.3g}")
    return table


def _link_table(plan: Forecast) -> Table:
    table = _table("Traffic between nodes", "layer", "routers on", "experts on", right=("B/token there", "back"))
    for each in plan.links:
        there, back = f"{each.bytes_there:.5g}", f"{each.bytes_back:.5g}"
        table.add_row(each.layer, each.router_node, each.expert_node, there, back)
    return table


def _table(title: str, *columns: str, right: tuple[str, ...]) -> Table:
    return Table(
        *columns,
        *(Column(name, justify="right") for name in right),
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
    )


def _bytes_text(num_bytes: int) -> str:
    amount, units = float(num_bytes), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.4g} {units[0]}"
