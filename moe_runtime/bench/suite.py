"""What a suite is, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moe_runtime.bench.sampling import Effort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_runtime.bench.aims import JsonRow
    from moe_runtime.bench.results import Row
    from moe_runtime.bench.tables import TextTable


class Stage(Protocol):
    """A part of a suite whose progress is shown."""

    def update(self, num_done: int, num_all: int) -> None:
        """So many steps of so many are done."""
        ...


@dataclass(frozen=True)
class BenchSettings:
    """What all suites are told.

    Attributes:
        quick: Fewer cases and shorter: on a quiet machine a suite takes under a minute, else under four.
        begin: Opens a stage of that title.
    """

    quick: bool
    begin: Callable[[str], Stage]

    @property
    def effort(self) -> Effort:
        """How much is measured per case of single calls."""
        return Effort(seconds=1.0, min_rounds=3) if self.quick else Effort(seconds=5.0, min_rounds=5)

    @property
    def load_effort(self) -> Effort:
        """How much is measured per case whose turns are whole runs of requests."""
        return Effort(seconds=1.0, min_rounds=3) if self.quick else Effort(seconds=6.0, min_rounds=3)


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        name: For the command line.
        title: What it measures, in a line.
        run: Measures it; gives rows as they are found.
        missing: What it needs and cannot find, and how to get it; None if nothing.
        tables: Its rows as tables, from their JSON form; one line per row where None.
    """

    name: str
    title: str
    run: Callable[[BenchSettings], Iterator[Row]]
    missing: Callable[[], str | None] = lambda: None
    tables: Callable[[Sequence[JsonRow]], Sequence[TextTable]] | None = None
