import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from moe_runtime.cli.router_views import RouterView
from moe_runtime.cli.status import print_json, print_tables
from moe_runtime.cli.status_tables import duration_text


def replica(state: str, *, node: str = "n1") -> dict[str, Any]:
    return {"state": state, "node": node, "device": "cpu", "pid": 7, "weights_version": "0123456789abcdef"}


def router(address: str, *, served: int, compute_ms: float, products: int) -> RouterView:
    counters = {
        "num_served": served,
        "num_dropped_capacity": 1,
        "num_dropped_failure": 2,
        "num_products": products,
        "compute_ms": compute_ms,
    }
    depth = {"queued_tokens": 5, "batches_in_flight": 1}
    layer_load = {"num_batches": 3, "num_tokens": 40, **depth, "experts": [counters, counters | {"num_products": 0}]}
    experts = [
        {"name": "conv-0", "kind": "conv", "replicas": [replica("ready"), replica("suspect", node="n2")]},
        {"name": "lost-0", "kind": "lost", "replicas": []},
    ]
    layer = {"item_shape": [1, 8], "out_shape": [10], "dtype": "float32", "policy": "top_k", "experts": experts}
    totals = {"num_requests": 9, "open_requests": 2, "num_refused": 3, "num_failed": 4}
    return RouterView(
        address,
        description={"name": "default", "layers": {"digits": layer}},
        load={"uptime_s": 75.0, "table_version": 6, "draining": False, **totals, "layers": {"digits": layer_load}},
    )


def printed(*routers: RouterView, as_json: bool = False, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    (print_json if as_json else print_tables)(routers, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, first_cell: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {first_cell}")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def cells(text: str, first_cell: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"{first_cell} ")]
    return re.split(r" {2,}", line.strip())


def test_a_router_is_a_row_with_its_load() -> None:
    text = printed(router("h:1", served=10, compute_ms=6.0, products=4))
    assert row(text, "h:1") == ["h:1", "1 min 15 s", "9", "2", "3", "4", "v6"]


def test_counters_of_an_expert_are_summed_over_the_routers() -> None:
    text = printed(
        router("h:1", served=10, compute_ms=6.0, products=4), router("h:2", served=20, compute_ms=2.0, products=4)
    )
    assert cells(text, "conv-0") == ["conv-0", "ready", "cpu pid 7 n1", "01234567", "30", "2", "4", "1.00"]
    assert "tokens 80, batches 6, queued tokens 10, batches in flight 2" in text


def test_a_shared_expert_is_marked_as_one() -> None:
    view = router("h:1", served=10, compute_ms=6.0, products=4)
    view.description["layers"]["digits"]["experts"][1]["shared"] = True
    text = printed(view)
    assert cells(text, "lost-0")[0] == "lost-0 (shared)"
    assert cells(text, "conv-0")[0] == "conv-0"


def test_each_replica_of_an_expert_has_its_own_line() -> None:
    lines = printed(router("h:1", served=10, compute_ms=6.0, products=4)).splitlines()
    [index] = [index for index, line in enumerate(lines) if "conv-0" in line]
    assert "suspect" in lines[index + 1]
    assert "n2" in lines[index + 1]


def test_nodes_are_told_apart_by_their_addresses_where_these_differ() -> None:
    view = router("h:1", served=1, compute_ms=1.0, products=1)
    layer = view.description["layers"]["digits"]
    nodes = ["198.18.77.11/0a", "198.18.77.12/0b"]
    layer["experts"][0]["replicas"] = [replica("ready", node=node) for node in nodes]
    assert [line.split()[-2] for line in printed(view).splitlines() if "198.18" in line][1:] == ["198.18.77.12"]
    layer["experts"][0]["replicas"] = [replica("ready", node=node) for node in ("h/0a", "h/0b")]
    assert "cpu pid 7 h/0b" in printed(view)


def test_an_expert_without_replicas_is_out_and_has_no_mean_time() -> None:
    text = printed(router("h:1", served=10, compute_ms=6.0, products=4))
    assert cells(text, "lost-0") == ["lost-0", "out", "10", "1", "2"]


def test_tables_read_well_at_80_columns() -> None:
    view = router("127.0.0.1:50051", served=123456, compute_ms=6.0, products=4)
    experts = view.description["layers"]["digits"]["experts"]
    experts[0] = {
        "name": "feed_forward-0",
        "kind": "feed_forward",
        "replicas": [{**replica("ready", node="a" * 56), "pid": 123456}],
    }
    text = printed(view, width=80)
    assert "…" not in text
    assert cells(text, "feed_forward-0") == [
        "feed_forward-0", "ready", "cpu pid 123456", "01234567", "123456", "1", "2", "1.50"
    ]  # fmt: skip


def test_shapes_are_printed_as_the_configuration_writes_them() -> None:
    assert "layer digits: [1, 8] → [10] float32, top_k" in printed(router("h:1", served=1, compute_ms=1, products=1))


def test_json_holds_everything_that_the_router_said() -> None:
    view = router("h:1", served=10, compute_ms=6.0, products=4)
    document = json.loads(printed(view, as_json=True))
    assert document == {"routers": [{"address": "h:1", "description": view.description, "load": view.load}]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_bias_that_moves_while_serving_has_a_line() -> None:
    view = router("h:1", served=10, compute_ms=6.0, products=4)
    layer = view.description["layers"]["digits"]
    assert "selection bias" not in printed(view)
    layer["balance"] = {"num_steps": 12, "largest_bias": 0.0123, "load_ratio": 1.75, "values": [0.0123, -0.0123]}
    assert "selection bias: 12 steps, largest 0.0123, max/mean load 1.75 before the last" in printed(view)
    layer["balance"] = {"num_steps": 0, "largest_bias": 0.0, "load_ratio": None, "values": [0.0, 0.0]}
    assert "selection bias: 0 steps, largest 0 " in printed(view)
