"""Markdown tables of what benchmarks found."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moe_runtime.bench.aims import Aim, JsonRow

_ERROR_SUFFIXES = ("_rms_error_percent", "_largest_error_percent")


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text already; ``title`` says what they hold."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        """Title and table."""
        return f"{self.title}:\n\n{_table(self.header, self.lines)}"


def machine_table(machine: Mapping[str, Any]) -> str:
    """The machine."""
    return _table(["machine", ""], [[name, str(value)] for name, value in machine.items()])


def figure_tables(rows: Sequence[JsonRow]) -> str:
    """Rows of one suite: a table for each sort of case, that is for each set of keys, in the order of the rows."""
    sorts: dict[tuple[str, ...], list[JsonRow]] = defaultdict(list)
    for row in rows:
        sorts[tuple(row["case"])].append(row)
    return "\n\n".join(figure_table(members) for members in sorts.values())


def figure_table(rows: Sequence[JsonRow]) -> str:
    """Rows of one suite: medians with quartiles in milliseconds, ratios, further figures."""
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


def aim_table(aims: Iterable[Aim], rows_by_suite: Mapping[str, Sequence[JsonRow]]) -> str:
    """What is to be reached, beside what was found."""
    lines = []
    for aim in aims:
        finding = aim.judge(rows_by_suite.get(aim.suite, ()))
        text, verdict = ("not measured", "") if finding is None else (finding.text, _verdict(reached=finding.reached))
        lines.append([aim.figure, aim.bound, text, verdict])
    return _table(["figure", "aim", "found", ""], lines)


def wire_error_table(rows: Iterable[JsonRow]) -> str:
    """The errors that a narrow ``wire_dtype`` makes, from the rows of suite `wire`; each is measured once per run."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name in row["figures"]:
            if name.endswith(_ERROR_SUFFIXES[0]):
                expert = name.removesuffix(_ERROR_SUFFIXES[0])
                values = [f"{row['figures'][expert + suffix]:.3f} %" for suffix in _ERROR_SUFFIXES]
                found[expert, row["case"]["wire_dtype"]] = values
    lines = [[expert, dtype, *values] for (expert, dtype), values in sorted(found.items())]
    return _table(["experts", "wire", "RMS error, relative", "largest error, of the largest output"], lines)


def _verdict(*, reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _with_spread(median: float, spread: Sequence[float]) -> str:
    return f"{median:.3g} ({spread[0]:.3g}-{spread[1]:.3g})"
