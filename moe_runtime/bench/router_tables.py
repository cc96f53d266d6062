"""Tables of suite `routers`: its rows are a grid of policies, sizes and shapes, too long to be read one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.bench.tables import TextTable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_runtime.bench.aims import JsonRow

#: The peers: a top-2 without anything around it, and that on logits that are there.
BARE, BARE_WITHOUT_GATE = "matmul + topk + sort", "topk + sort"

#: Cases that solve an assignment problem over the batch, which takes its time.
BALANCED = ("global_assignment, training",)


def router_tables(rows: Sequence[JsonRow]) -> list[TextTable]:
    """The headline beside its peers, what every policy costs, and how it spreads tokens, a table per size."""
    full = [row for row in rows if row["peer"] == BARE]
    sizes = _distinct(full, "experts")
    return [_headline(rows), _costs(full, sizes), *(_spread(full, size) for size in sizes)]


def _headline(rows: Sequence[JsonRow]) -> TextTable:
    lines = [
        [str(size), peer, _range([row["ratio"] for row in rows if _is(row, peer=peer, policy="top_k", experts=size)])]
        for size in _distinct(rows, "experts")
        for peer in (BARE, BARE_WITHOUT_GATE)
    ]
    return TextTable("Top-2 ÷ the bare arithmetic, over all shapes", ["experts", "peer", "ours ÷ peer"], lines)


def _costs(rows: Sequence[JsonRow], sizes: Sequence[int]) -> TextTable:
    def cell(policy: str, size: int, pick: Callable[[Sequence[JsonRow]], JsonRow]) -> str:
        row = pick([row for row in rows if _is(row, peer=BARE, policy=policy, experts=size)])
        return f"{row['figures']['us_per_token']:.2g} ({row['ratio']:.2g}), {row['case']['shape']}"

    header = ["policy", *(f"{size} experts, {which}" for size in sizes for which in ("first", "slowest"))]
    lines = [
        [policy, *(cell(policy, size, pick) for size in sizes for pick in (_first, _slowest))]
        for policy in _distinct(rows, "policy")
    ]
    return TextTable(f"µs per token (÷ {BARE}) on an even load, and on the shape where that is most", header, lines)


def _spread(rows: Sequence[JsonRow], size: int) -> TextTable:
    shapes = _distinct(rows, "shape")

    def cell(policy: str, shape: str) -> str:
        rows_of_policy = [row for row in rows if _is(row, peer=BARE, policy=policy, experts=size)]
        (figures,) = (row["figures"] for row in rows_of_policy if row["case"]["shape"] == shape)
        return f"{figures['max_over_mean']:.3g}, {figures['dropped']:.0%}".replace("%", " %")

    return TextTable(
        f"Load of the busiest expert ÷ mean, and assignments dropped at capacity 1.25; {size} experts",
        ["policy", *shapes],
        [[policy, *(cell(policy, shape) for shape in shapes)] for policy in _distinct(rows, "policy")],
    )


def _first(rows: Sequence[JsonRow]) -> JsonRow:
    return rows[0]


def _slowest(rows: Sequence[JsonRow]) -> JsonRow:
    return max(rows, key=lambda row: row["ratio"])


def _is(row: JsonRow, *, peer: str, policy: str, experts: int) -> bool:
    case: Mapping[str, Any] = row["case"]
    return (row["peer"], case["policy"], case["experts"]) == (peer, policy, experts)


def _distinct(rows: Sequence[JsonRow], key: str) -> list[Any]:
    return list(dict.fromkeys(row["case"][key] for row in rows))


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"
