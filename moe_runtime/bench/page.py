"""Writes the figures of a run into `docs/benchmarks.md`: tables between its markers, and plots beside it.

Run as `python -m moe_runtime.bench.page RESULTS.json DOCS_FOLDER`; `make bench-docs` measures first.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PAGE = "benchmarks.md"
#: The suites that are plotted, and the key of the case that is their x axis.
_PLOTTED = {"exchange": "rows", "layer": "tokens", "peers": "tokens"}
_MARKER = "<!-- figures: {name} -->\n{content}\n<!-- end -->"

Results = dict[str, Any]


def write_page(results: Results, docs: Path) -> None:
    """Put a run's figures into the page, and its plots into ``img`` beside it.

    Args:
        results: What ``--json`` writes.
        docs: Folder of the page.

    Raises:
        BenchError: If the page has no place for a suite of the run.
    """
    rows_by_suite: dict[str, list[Results]] = defaultdict(list)
    for row in results["rows"]:
        rows_by_suite[row["suite"]].append(row)
    page = (docs / PAGE).read_text()
    page = _replace(page, "machine", machine_table(results["machine"]))
    for suite, rows in rows_by_suite.items():
        page = _replace(page, suite, figure_table(rows))
    (docs / PAGE).write_text(page)
    for suite, x_key in _PLOTTED.items():
        if suite in rows_by_suite:
            plot(rows_by_suite[suite], docs / "img" / f"bench-{suite}.svg", x_key=x_key)


def machine_table(machine: Mapping[str, Any]) -> str:
    """The machine as a Markdown table."""
    return _table(["machine", ""], [[name, str(value)] for name, value in machine.items()])


def figure_table(rows: Sequence[Results]) -> str:
    """Rows of one suite as a Markdown table: medians with quartiles in milliseconds, ratios, further figures."""
    case_keys = _keys(row["case"] for row in rows)
    figures = _keys(row["figures"] for row in rows)
    header = [*case_keys, "ours ms", "peer", "peer ms", "ours ÷ peer", *figures]
    lines = [
        [
            *(str(row["case"].get(key, "")) for key in case_keys),
            _with_spread(row["ours_ms"], row["ours_spread_ms"]),
            row["peer"],
            _with_spread(row["peer_ms"], row["peer_spread_ms"]),
            f"**{row['ratio']:.2f}**",
            *(f"{row['figures'][name]:.3g}" if name in row["figures"] else "" for name in figures),
        ]
        for row in rows
    ]
    return _table([name.replace("_", " ") for name in header], lines)


def plot(rows: Sequence[Results], path: Path, *, x_key: str) -> None:
    """Times over sizes, both axes logarithmic, one panel per other value of the case.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise BenchError("plots: expected matplotlib, not installed: pip install 'moe-runtime[bench]'") from exc
    panels: dict[str, list[Results]] = defaultdict(list)
    for row in rows:
        panels[", ".join(str(value) for key, value in row["case"].items() if key != x_key)].append(row)
    # Text as text: a tenth of the size, and it can be searched.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, members) in zip(axes, panels.items(), strict=True):
            _draw(axis, members, title=title, x_key=x_key)
        axes[0].set_ylabel("ms")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw(axis: Any, rows: Sequence[Results], *, title: str, x_key: str) -> None:
    lines: dict[str, dict[int, tuple[float, list[float]]]] = defaultdict(dict)
    for row in rows:
        size = row["case"][x_key]
        lines["moe_runtime"][size] = (row["ours_ms"], row["ours_spread_ms"])
        lines[row["peer"]][size] = (row["peer_ms"], row["peer_spread_ms"])
    for name, points in lines.items():
        sizes = sorted(points)
        style = {"linewidth": 2.2, "color": "black"} if name == "moe_runtime" else {"linewidth": 1.2}
        axis.plot(sizes, [points[size][0] for size in sizes], marker="o", markersize=3, label=name, **style)
        low, high = ([points[size][1][end] for size in sizes] for end in (0, 1))
        axis.fill_between(sizes, low, high, alpha=0.15, color=style.get("color"))
    axis.set(xscale="log", yscale="log", xlabel=x_key, title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _replace(page: str, name: str, content: str) -> str:
    pattern = re.compile(rf"<!-- figures: {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
    if not pattern.search(page):
        raise BenchError(f"{PAGE}: expected a place for {name}: <!-- figures: {name} --> <!-- end -->")
    return pattern.sub(lambda _: _MARKER.format(name=name, content=content), page)


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _with_spread(median: float, spread: Sequence[float]) -> str:
    return f"{median:.3g} ({spread[0]:.3g}-{spread[1]:.3g})"


if __name__ == "__main__":
    write_page(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
