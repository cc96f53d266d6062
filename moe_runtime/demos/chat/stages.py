"""The stages of a start: a bar for each while it lasts, and how long it took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_runtime.progress import make_progress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.console import Console
    from rich.progress import Progress, TaskID


class Stage:
    """One stage under way."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, share: float, note: str) -> None:
        """Show how far it is.

        Args:
            share: Of it that is done, 0 to 1.
            note: Behind the bar.
        """
        self._progress.update(self._task, total=1.0, completed=share, note=note)


class Stages:
    """Bars on a console, one below the other; they stay there. A context manager.

    Attributes:
        seconds: How long each stage took that is over, by its key.
    """

    def __init__(self, notes: Console) -> None:
        """Show nothing yet."""
        self._progress = make_progress(notes)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, key: str, title: str) -> Iterator[Stage]:
        """A stage that lasts as long as the block.

        Args:
            key: Its name in ``seconds``.
            title: Its name for people.
        """
        task = self._progress.add_task(title, total=None, note="")
        started = time.perf_counter()
        yield Stage(self._progress, task)
        self._progress.update(task, total=1.0, completed=1.0)
        self.seconds[key] = time.perf_counter() - started

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
