"""The table of all metrics in docs/observability.md, written from the catalogue: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_runtime.metrics.catalogue import CATALOGUE

BEGIN = "<!-- metrics: written by `make docs` from moe_runtime/metrics/catalogue.py -->"
END = "<!-- end of metrics -->"


def metrics_table() -> str:
    """Every metric as a row."""
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.meaning} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with the present table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{metrics_table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
