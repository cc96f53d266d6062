"""Processes of the benchmark's own that peers run in; each ends with its parent, however that ends."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext
    from types import TracebackType
    from typing import Self

_ANSWER_WITHIN_S = 120.0
_END_WITHIN_S = 5.0


class Child:
    """One process that answers messages; a context manager that ends it.

    Args:
        main: What it runs: a module's function, which returns when its connection is closed.
        arguments: For ``main``, after the connection.
        preload: Modules that are imported once for all children that name them, which then start at once.
    """

    def __init__(self, main: Callable[..., None], *arguments: Any, preload: Sequence[str] = ()) -> None:
        # Spawned, or forked from a process that runs nothing: this one's threads, Ray's too, would be half alive.
        context = _preloaded(preload) if preload else multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(main, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid or 0

    def ask(self, *message: Any, timeout_s: float = _ANSWER_WITHIN_S) -> Any:
        """Send a message and return its answer.

        Raises:
            BenchError: If the process does not answer in time, or has ended.
        """
        self.tell(*message)
        return self.answer(timeout_s=timeout_s)

    def tell(self, *message: Any) -> None:
        """Send a message.

        Raises:
            BenchError: If the process has ended.
        """
        try:
            self._connection.send(message)
        except OSError as exc:
            raise BenchError(f"a peer's process ended early, exit code {self._process.exitcode}") from exc

    def answer(self, *, timeout_s: float = _ANSWER_WITHIN_S) -> Any:
        """The answer to the oldest message that has none.

        Raises:
            BenchError: If the process does not answer in time, or has ended.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise BenchError(f"a peer's process has not answered within {timeout_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError) as exc:
            self._process.join(_END_WITHIN_S)
            raise BenchError(f"a peer's process ended early, exit code {self._process.exitcode}") from exc

    def hang_up(self) -> None:
        """Let it end, without waiting. Safe to call twice."""
        self._connection.close()

    def close(self) -> None:
        """End it. Safe to call twice."""
        self.hang_up()
        self._process.join(_END_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _preloaded(modules: Sequence[str]) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _run(main: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        main(connection, *arguments)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        # The parent is gone, or is being stopped from the keyboard together with its children.
        connection.close()
