"""Writes the table of docs/routers.md: ``python -m moe_runtime.cli.presets_page PATH`` (``make docs``)."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_runtime.cli.preset_texts import capacity_text, experts_text, losses_text, policy_text
from moe_runtime.config.presets.catalogue import PRESETS

BEGIN = "<!-- presets: written by `make docs` from moe_runtime/config/presets -->"
END = "<!-- end of presets -->"


def presets_table() -> str:
    """Every preset as a row."""
    rows = [
        "| preset | system | year | policy | experts | capacity | losses | what differs elsewhere, and here |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for preset in PRESETS.values():
        cells = (
            f"`{preset.name}`",
            f"[{preset.title}]({preset.source})",
            str(preset.year),
            policy_text(preset),
            experts_text(preset),
            capacity_text(preset),
            losses_text(preset),
            preset.differs,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with the present table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{presets_table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
