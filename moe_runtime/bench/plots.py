"""Plots of a suite's times over sizes."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moe_runtime.bench.aims import JsonRow


def plot(rows: Sequence[JsonRow], path: Path, *, x_key: str) -> None:
    """Times over sizes, both axes logarithmic, one panel per other value of the case.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    panels: dict[str, list[JsonRow]] = defaultdict(list)
    for row in rows:
        panels[", ".join(str(value) for key, value in row["case"].items() if key != x_key)].append(row)
    with save_figure(path, num_panels=len(panels), height=3.2) as axes:
        for axis, (title, members) in zip(axes, panels.items(), strict=True):
            _draw(axis, members, title=title, x_key=x_key)
        axes[0].set_ylabel("ms")


@contextmanager
def save_figure(path: Path, *, num_panels: int, height: float) -> Iterator[Sequence[Any]]:
    """The axes of a figure's panels, side by side; it is saved at the end, the same content as the same bytes.

    Args:
        path: Where to.
        num_panels: How many there are.
        height: Of each, in inches.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise BenchError("plots: expected matplotlib, not installed: pip install 'moe-runtime[bench]'") from exc
    # Text as text: a tenth of the size, and it can be searched.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe", "font.size": 9}):
        figure = Figure(figsize=(4.2 * num_panels, height), layout="constrained")
        yield figure.subplots(1, num_panels, squeeze=False, sharey=True)[0]
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw(axis: Any, rows: Sequence[JsonRow], *, title: str, x_key: str) -> None:
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
