"""Writes the figures of a run into a page, between its markers; what stands outside of them is written by hand.

Run as `python -m moe_runtime.chaos.page RESULT.json PAGE.md`, as `make chaos-docs` does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.chaos.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PLACES = re.compile(r"<!-- figures: (?P<name>[a-z]+) -->.*?<!-- end -->", re.DOTALL)
#: What is promised of each recovery time, in milliseconds.
AIMS_MS = {"kill_to_noticed": 100.0, "kill_to_other_answer": 300.0, "router_failover": 1000.0}


def fill_page(page: str, result: Mapping[str, Any]) -> str:
    """A page with the figures of a result in its places.

    Args:
        page: Has ``<!-- figures: NAME --> ... <!-- end -->`` for ``ledger`` and ``recovery``.
        result: As ``--json`` writes it.

    Raises:
        ChaosError: If a place is missing, or has an unknown name.
    """
    blocks = {"ledger": f"{_origin(result)}\n\n{ledger_table(result)}", "recovery": recovery_table(result)}
    places = {match["name"] for match in _PLACES.finditer(page)}
    if places != set(blocks):
        raise ChaosError(f"page: expected places for {', '.join(blocks)}, found {', '.join(sorted(places)) or 'none'}")
    return _PLACES.sub(lambda match: f"<!-- figures: {match['name']} -->\n{blocks[match['name']]}\n<!-- end -->", page)


def ledger_table(result: Mapping[str, Any]) -> str:
    """What became of the requests and their assignments, and what was done to the cluster."""
    latency = result["latency_ms"]
    errors = ", ".join(f"{name} {count:,}" for name, count in result["errors"].items())
    faults = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in result["num_faults"].items())
    dropped = f"{result['dropped_failure']:,} by failure, {result['dropped_capacity']:,} by capacity"
    compared = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in result["counters_compared"].items())
    return _table(
        ("", "found"),
        [
            ("requests", f"{result['num_requests']:,}"),
            ("answered", f"{result['num_ok']:,}"),
            ("errors", errors or "none"),
            ("right requests taken for poison", f"{result['innocent_errors'].get('PoisonedRequestError', 0):,}"),
            ("**wrong, lost, late, leaked**", "**{num_wrong}, {num_lost}, {num_late}, {num_leaks}**".format(**result)),
            ("faults", f"{faults}; {result['num_kills']:,} processes killed"),
            ("assignments served", f"{result['served']:,}"),
            ("retried, rerouted, hedged", f"{result['retried']:,}, {result['rerouted']:,}, {result['hedged']:,}"),
            ("dropped", dropped),
            (
                "latency at the client",
                f"p50 {latency['p50']:.0f}, p99 {latency['p99']:.0f}, worst {latency['max']:.0f} ms",
            ),
            ("longest after a deadline", f"{result['worst_overshoot_ms']:.0f} ms"),
            ("windows of counters", compared or "none"),
        ],
    )


def recovery_table(result: Mapping[str, Any]) -> str:
    """Recovery times that were measured apart, beside what is promised of them."""
    rows = []
    for name, spread in (result["recovery_ms"] or {}).items():
        aim = f"< {AIMS_MS[name]:.0f} ms" if name in AIMS_MS else "reported"
        if spread is not None:
            found = (f"{spread['p50']:.0f}", f"{spread['max']:.0f}", f"{spread['count']}")
            rows.append((name.replace("_", " "), aim, *found))
    return _table(("from, to", "aim", "median ms", "worst ms", "times"), rows)


def _origin(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    what = f"Seed {result['seed']}, {result['load_s'] / 60:.0f} min of load on {result['date'][:10]}"
    where = f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores"
    return f"*{what}, commit `{machine.get('commit', 'unknown')}`, {where}.*"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    _path = Path(sys.argv[2])
    _path.write_text(fill_page(_path.read_text(), json.loads(Path(sys.argv[1]).read_text())))
