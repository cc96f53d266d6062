"""The main job end to end: fetch, upcycle, start actors, compare with the dense model, chat, report."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moe_runtime.demos.chat.lines import piped_lines, typed_lines
from moe_runtime.demos.chat.render import show_comparison, show_ready, show_title
from moe_runtime.demos.chat.result import ChatResult
from moe_runtime.demos.chat.settings import SYSTEM_PROMPT
from moe_runtime.demos.chat.stages import Stages
from moe_runtime.demos.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from moe_runtime.demos.chat.answering import Answer
    from moe_runtime.demos.chat.served import ServedModel
    from moe_runtime.demos.chat.settings import ChatSettings


def run(
    settings: ChatSettings, *, out: Console, notes: Console, ray: bool = True, lines: Iterable[str] | None = None
) -> ChatResult:
    """Chat with a language model whose experts are Ray actors, or have it answer once.

    Ends cleanly on ``KeyboardInterrupt``: nothing is left running, and nothing half-made is kept.

    Args:
        settings: What is asked for.
        out: Where answers go.
        notes: Where progress, figures and everything else goes.
        ray: Whether the experts are Ray actors; otherwise they are threads of this process.
        lines: Questions and commands; those of standard input when None.

    Raises:
        DemoError: If something that it needs is not there; or if the tokens are not the dense model's, after the
            chat.
        ConfigError: If the model cannot be had, or its experts cannot live in actors.
        MoERuntimeError: If the experts do not start; or, with a prompt, if it is not answered.
    """
    settings.check()
    _check_installed()
    show_title(notes)
    stack = ExitStack()
    try:
        with Stages(notes) as stages:
            with stages.stage("importing", "Loading libraries"):
                # They take seconds, in which there is something to see.
                from moe_runtime.demos.chat.opening import opened_model
            opened = stack.enter_context(opened_model(settings, stages=stages, ray=ray))
        show_comparison(notes, opened.comparison)
        stack.enter_context(_quiet_logs(notes))
        answers = _converse(opened.served, settings, out=out, notes=notes, lines=lines)
        result = ChatResult(
            model=opened.served.name,
            checkpoint=opened.checkpoint,
            answers=answers,
            comparison=opened.comparison,
            experts=opened.served.read(),
            start_s=stages.seconds,
        )
    finally:
        with notes.status("Stopping actors"):
            stack.close()
    if settings.json_path is not None:
        result.write_json(settings.json_path)
    result.check()
    return result


@contextmanager
def _quiet_logs(notes: Console) -> Iterator[None]:
    """Keep warnings out of the middle of an answer on a terminal, which says what matters of them; not with --debug."""
    logger = logging.getLogger("moe_runtime")
    before = logger.level
    if notes.is_terminal and logger.getEffectiveLevel() > logging.DEBUG:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _converse(
    served: ServedModel, settings: ChatSettings, *, out: Console, notes: Console, lines: Iterable[str] | None
) -> tuple[Answer, ...]:
    from moe_runtime.demos.chat.terminal import Terminal

    system = SYSTEM_PROMPT if settings.system is None and settings.checkpoint is None else settings.system
    terminal = Terminal(served, sampling=settings.sampling, system=system, out=out, notes=notes)
    if settings.prompt is not None:
        terminal.ask(settings.prompt)
        return tuple(terminal.answers)
    show_ready(notes, served)
    typed = lines is None and sys.stdin.isatty()
    if lines is None:
        lines = typed_lines(notes) if typed else piped_lines(out)
    terminal.chat(lines, keeps_on=typed)
    return tuple(terminal.answers)


def _check_installed() -> None:
    """Find out whether the extra is there.

    Raises:
        DemoError: If it is not; the message says how to install it.
    """
    missing = [package for package in ("transformers", "gguf") if find_spec(package) is None]
    if missing:
        raise DemoError(f"the chat needs {' and '.join(missing)}: pip install 'moe-runtime[transformers]'")
