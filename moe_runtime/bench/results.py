"""What a benchmark found: rows, the machine, and both as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class SuiteRun:
    """When and how a suite was measured.

    Attributes:
        date: Its end, UTC, in ISO 8601.
        quick: Whether in the quick form.
        seconds: How long it took, with the start of everything.
        commit: Of this repository; None outside it.
    """

    date: str
    quick: bool
    seconds: float
    commit: str | None = None


def write_json(
    path: Path, *, machine: Mapping[str, Any], rows: list[Row], runs: Mapping[str, SuiteRun] | None = None
) -> None:
    """Write what was measured to a file as one JSON object; ``runs`` by suite."""
    results = {
        "machine": dict(machine),
        "runs": {suite: asdict(run) for suite, run in (runs or {}).items()},
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
