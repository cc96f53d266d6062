"""Routers, layers and experts as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from moe_runtime.cli.router_views import RouterView
from moe_runtime.cli.validation import shape_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from moe_runtime.cli.router_views import Silence

_STATE_STYLES = {"ready": "green", "starting": "yellow", "suspect": "yellow", "out": "red"}
#: Counters of an expert that are worth a line where they are not zero, and what that line calls them.
_STEPS = {
    "num_retried": "retried",
    "num_rerouted": "rerouted",
    "num_hedged": "hedged",
    "num_timed_out": "timed out",
    "num_failed_attempts": "failed attempts",
}


def status_tables(routers: Sequence[RouterView | Silence]) -> Iterator[RenderableType]:
    """The routers, then each layer with its experts; counters are sums over the routers that answer."""
    yield _router_table(routers)
    views = [router for router in routers if isinstance(router, RouterView)]
    layers = {name: layer for view in reversed(views) for name, layer in view.description["layers"].items()}
    for name, layer in layers.items():
        loads = [view.load["layers"][name] for view in views if name in view.load["layers"]]
        yield _layer_table(name, layer, loads)
        notes = [*_reasons(layer), *_steps(layer, loads), *_balance(layer)]
        if notes:
            yield Padding(Text("\n".join(notes)), (0, 0, 1, 2))


def runtime_tables(description: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Hosts, programs that route for themselves, and each layer with its experts; what is counted, they count."""
    hosts = Table(
        "host", "state", "node", "pid", "restarts", title=f"runtime {description['name']}", title_justify="left"
    )
    for host in description["hosts"]:
        counts = [str(host["pid"]), str(host["num_restarts"])]
        hosts.add_row(host["host_id"], _styled(host["state"]), host["node"] or "", *counts)
    yield hosts
    callers = Table("program", "node", "oldest table", title="programs", title_justify="left")
    for caller in description["callers"]:
        callers.add_row(f"pid {caller['pid']}", caller["node"], f"v{caller['oldest_table_version']}")
    yield callers
    for name, layer in description["layers"].items():
        yield _layer_table(name, layer, [])


def _reasons(layer: Mapping[str, Any]) -> Iterator[str]:
    """A line per replica that says why it is in its state."""
    for expert in layer["experts"]:
        for replica in expert["replicas"]:
            if replica.get("reason"):
                yield f"{replica['replica_id']} is {replica['state']}: {replica['reason']}"


def _steps(layer: Mapping[str, Any], loads: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line per expert for which more than one attempt was made, or an attempt failed."""
    for index, expert in enumerate(layer["experts"]):
        sums = {text: sum(load["experts"][index].get(key, 0) for load in loads) for key, text in _STEPS.items()}
        told = [f"{text} {count}" for text, count in sums.items() if count]
        if told:
            yield f"{expert['name']}: {', '.join(told)}"


def _balance(layer: Mapping[str, Any]) -> Iterator[str]:
    """A line where the selection bias moves while serving."""
    balance = layer.get("balance")
    if balance:
        ratio = balance["load_ratio"]
        before = "" if ratio is None else f", max/mean load {ratio:.2f} before the last"
        yield f"selection bias: {balance['num_steps']} steps, largest {balance['largest_bias']:.4g}{before}"


def _router_table(routers: Sequence[RouterView | Silence]) -> Table:
    table = Table(
        "router", "up", "requests", "open", "refused", "failed", "table", title="routers", title_justify="left"
    )
    for router in routers:
        if not isinstance(router, RouterView):
            table.add_row(router.address, f"[red]{escape(router.reason)}[/]")
            continue
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
    name = f"{expert['name']} (shared)" if expert.get("shared") else expert["name"]
    first = [name, *places[0], str(served), str(full), str(failed), mean_ms]
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
