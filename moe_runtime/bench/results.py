"""What a benchmark found: rows, the machine, and both as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moe_runtime.bench.sampling import Sample

_DIGITS = 4


@dataclass(frozen=True)
class Row:
    """Ours beside one peer, in one case.

    Attributes:
        suite: Name of the suite.
        case: What was measured: ``rows``, ``tokens``, ``expert``, ``kind``, ``clients`` and so on.
        peer: Beside whom.
        ours: Our times.
        theirs: The peer's times, from turns between ours.
        figures: Further figures of ours, by name with their unit.
    """

    suite: str
    case: Mapping[str, Any]
    peer: str
    ours: Sample
    theirs: Sample
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Our median over the peer's: below 1 is faster."""
        return self.ours.median_ms / self.theirs.median_ms

    def as_json(self) -> dict[str, Any]:
        """The row as plain values; spreads are the quartiles."""
        return {
            "suite": self.suite,
            "case": dict(self.case),
            "ours_ms": round(self.ours.median_ms, _DIGITS),
            "ours_spread_ms": [round(ms, _DIGITS) for ms in self.ours.spread_ms],
            "peer": self.peer,
            "peer_ms": round(self.theirs.median_ms, _DIGITS),
            "peer_spread_ms": [round(ms, _DIGITS) for ms in self.theirs.spread_ms],
            "ratio": round(self.ratio, _DIGITS),
            "figures": {name: round(value, _DIGITS) for name, value in self.figures.items()},
        }


def write_json(path: Path, *, machine: Mapping[str, Any], rows: list[Row]) -> None:
    """Write a run to a file as one JSON object."""
    results = {"machine": dict(machine), "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(results, indent=1) + "\n")
