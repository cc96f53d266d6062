"""``moe-runtime status``: what the routers say of themselves, as tables or as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from moe_runtime.cli.connections import Connection
from moe_runtime.cli.validation import shape_text
from moe_runtime.errors import MoERuntimeError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from rich.console import Console

_STATE_STYLES = {"ready": "green", "starting": "yellow", "suspect": "yellow", "out": "red"}


@dataclass(frozen=True)
class RouterView:
    """What one router says.

    Attributes:
        address: Where it was asked.
        description: Layers, experts and replicas, as ``MoEClient.describe`` has them.
        load: Counters and queues, as ``MoEClient.status`` has them.
    """

    address: str
    description: Mapping[str, Any]
    load: Mapping[str, Any]


def ask_routers(
    addresses: tuple[str, ...], *, timeout_s: float, connection: Connection | None = None
) -> tuple[RouterView, ...]:
    """What the routers at these addresses say.

    Raises:
        UnavailableError: If one of them does not answer.
        MoERuntimeError: If one answers with an error.
    """
    connection = connection or Connection()
    return tuple(_ask(address, timeout_s=timeout_s, connection=connection) for address in addresses)


def _ask(address: str, *, timeout_s: float, connection: Connection) -> RouterView:
    with connection.client(address) as client:
        try:
            return RouterView(
                address, description=client.describe(timeout_s=timeout_s), load=client.status(timeout_s=timeout_s)
            )
        except UnavailableError as exc:
            raise UnavailableError(
                f"nothing serves at {address}: start it with `moe-runtime serve CONFIG --address {address}`, "
                "or name another with --address"
            ) from exc
        except MoERuntimeError as exc:
            raise type(exc)(f"{address}: {exc}") from exc


def print_json(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print everything that the routers say, as one JSON document."""
    document = {"routers": [vars(router) for router in routers]}
    console.print(json.dumps(document, indent=2), markup=False, soft_wrap=True)


def print_tables(routers: tuple[RouterView, ...], *, console: Console) -> None:
    """Print the routers, then each layer with its experts; counters are sums over the routers."""
    console.print(_router_table(routers))
    for name, layer in routers[0].description["layers"].items():
        loads = [router.load["layers"][name] for router in routers if name in router.load["layers"]]
        console.print(_layer_table(name, layer, loads))


def _router_table(routers: tuple[RouterView, ...]) -> Table:
    table = Table(
        "router", "up", "requests", "open", "refused", "failed", "table", title="routers", title_justify="left"
    )
    for router in routers:
        load = router.load
        state = " (draining)" if load.get("draining") else ""
        table.add_row(
            router.address + state,
            duration_text(load["uptime_s"]),
            str(load["num_requests"]),
            str(load["open_requests"]),
            str(load["num_refused"]),
            str(load["num_failed"]),
            f"v{load['table_version']}",
        )
    return table


def _layer_table(name: str, layer: Mapping[str, Any], loads: list[Mapping[str, Any]]) -> Table:
    shapes = f"{shape_text(layer['item_shape'])} → {shape_text(layer['out_shape'])} {layer['dtype']}"
    batches, tokens, queued, in_flight = (
        sum(load[key] for load in loads) for key in ("num_batches", "num_tokens", "queued_tokens", "batches_in_flight")
    )
    table = Table(
        Column("expert", overflow="fold"), "state", "runs on", "weights", "served", "full", "failed", "mean ms",
        title=f"layer {name}: {shapes}, {layer['policy']}\n"
        f"tokens {tokens}, batches {batches}, queued tokens {queued}, batches in flight {in_flight}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    nodes = {replica["node"] for expert in layer["experts"] for replica in expert["replicas"]}
    for index, expert in enumerate(layer["experts"]):
        counters = [load["experts"][index] for load in loads]
        for row in _expert_rows(expert, counters, nodes=_node_texts(nodes)):
            table.add_row(*row)
    return table


def _expert_rows(
    expert: Mapping[str, Any], loads: list[Mapping[str, Any]], *, nodes: Mapping[str, str]
) -> list[list[str]]:
    """A row per replica, the first of which has the expert's name and counters."""
    replicas = expert["replicas"]
    served, full, failed, products, compute_ms = (
        sum(load[key] for load in loads)
        for key in ("num_served", "num_dropped_capacity", "num_dropped_failure", "num_products", "compute_ms")
    )
    places = [
        [_styled(replica["state"]), _place(replica, nodes), replica["weights_version"][:8]] for replica in replicas
    ] or [[_styled("out"), "", ""]]
    mean_ms = f"{compute_ms / products:.2f}" if products else ""
    first = [expert["name"], *places[0], str(served), str(full), str(failed), mean_ms]
    return [first, *(["", *place] for place in places[1:])]


def _place(replica: Mapping[str, Any], nodes: Mapping[str, str]) -> str:
    return f"{replica['device']} pid {replica['pid']} {nodes[replica['node']]}".rstrip()


def _node_texts(nodes: Collection[str]) -> dict[str, str]:
    """What each node is called in a table: nothing where there is one, its address if that tells it apart."""
    addresses = {node: node.partition("/")[0] for node in nodes}
    if len(nodes) <= 1:
        return dict.fromkeys(nodes, "")
    return addresses if len(set(addresses.values())) == len(nodes) else {node: node for node in nodes}


def _styled(state: str) -> str:
    style = _STATE_STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: ``3 h 2 min``, ``14 s``."""
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (whole_seconds, "s"))
    parts = [f"{count} {unit}" for count, unit in units]
    first = next((index for index, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(parts[first : first + 2])
