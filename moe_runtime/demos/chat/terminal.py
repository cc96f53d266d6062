"""The conversation as a person has it: questions and commands from lines, answers as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.text import Text

from moe_runtime.demos.chat.answering import AnswerUnderWay
from moe_runtime.demos.chat.conversation import Conversation
from moe_runtime.demos.chat.heat_map import heat_map
from moe_runtime.demos.chat.word_wrap import WordWrap
from moe_runtime.errors import MoERuntimeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from moe_runtime.demos.chat.answering import Answer
    from moe_runtime.demos.chat.conversation import Prompt
    from moe_runtime.demos.chat.served import ServedModel
    from moe_runtime.demos.chat.settings import Sampling

HELP = """\
/experts  the load of every expert of every layer in this conversation
/reset    forget what was said, and begin anew
/help     this
/quit     end; so does Ctrl-D. Ctrl-C stops an answer"""
#: Without a word for so long, somebody looks whether an expert is gone.
_SILENCE_S = 2.0
#: How long an answer may take to stop: one token, unless an expert is gone.
_STOP_S = 3.0


class Terminal:
    """One conversation.

    Attributes:
        answers: What was answered so far, oldest first; ``/reset`` keeps them.
    """

    def __init__(
        self, served: ServedModel, *, sampling: Sampling, system: str | None, out: Console, notes: Console
    ) -> None:
        """Begin.

        Args:
            served: The model.
            sampling: How answers are drawn.
            system: The system prompt; None leaves it to the model's template.
            out: Where answers go.
            notes: Where everything about them goes.
        """
        self._served = served
        self._sampling = sampling
        self._conversation = Conversation(served.tokenizer, context=served.context, system=system)
        self._out = out
        self._notes = notes
        self._start = served.read()
        self._ends_line = True
        self.answers: list[Answer] = []
        torch.manual_seed(sampling.seed)

    def chat(self, lines: Iterable[str], *, keeps_on: bool) -> None:
        """Answer questions and follow commands until the lines end or one of them says so.

        Args:
            lines: What was typed.
            keeps_on: Whether Ctrl-C ends only the answer, not the chat.

        Raises:
            KeyboardInterrupt: On Ctrl-C, unless ``keeps_on``.
        """
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self._follow(text)
            elif text:
                self._ask_and_go_on(text, keeps_on=keeps_on)

    def ask(self, question: str) -> Answer:
        """Answer a question, and show the words as they come.

        Raises:
            DemoError: If the question is too long.
            ExpertError: If an expert cannot be had.
            KeyboardInterrupt: On Ctrl-C; the answer so far is kept.
        """
        self._ends_line = False
        prompt = self._conversation.prompt(question, max_new_tokens=self._sampling.max_new_tokens)
        self._tell_forgotten(prompt)
        under_way = AnswerUnderWay(self._served.model, self._served.tokenizer, question=question)
        under_way.start(prompt.ids, self._sampling, context=self._conversation.context)
        try:
            self._show(under_way)
        except KeyboardInterrupt:
            if not under_way.stop(timeout_s=_STOP_S):
                self._note("an expert is being replaced: the next answer begins when it is back")
            raise
        except BaseException:
            # The process ends, or an expert is gone for good.
            under_way.stop(timeout_s=0.0)
            raise
        finally:
            self._keep(under_way.answer())
        return self.answers[-1]

    def _ask_and_go_on(self, question: str, *, keeps_on: bool) -> None:
        try:
            self.ask(question)
        except KeyboardInterrupt:
            if not keeps_on:
                raise
        except MoERuntimeError as exc:
            self._notes.print(Text(f"error: {exc}", style="red"))

    def _follow(self, command: str) -> None:
        if command == "/experts":
            self._show_experts()
        elif command == "/reset":
            self._conversation.reset()
            torch.manual_seed(self._sampling.seed)
            self._note("forgotten")
        elif command == "/help":
            self._out.print(HELP, markup=False, highlight=False)
        else:
            self._note(f"{command}: expected /experts, /reset, /help or /quit")

    def _show_experts(self) -> None:
        try:
            now = self._served.read()
        except MoERuntimeError as exc:
            self._notes.print(Text(f"error: {exc}", style="red"))
            return
        loads = now.loads.since(self._start.loads)
        self._out.print()
        self._out.print(heat_map(loads, width=self._out.width, actors=now.actors))
        self._out.print()

    def _show(self, under_way: AnswerUnderWay) -> None:
        wrap, told = self._new_wrap(), False
        for piece in under_way.pieces(silence_s=_SILENCE_S):
            if piece:
                self._write(wrap.feed(piece))
            elif not told and self._expert_is_gone():
                told = True
                self._write(wrap.flush())
                self._end_line()
                self._note("an expert is being replaced: the answer goes on when it is back")
                wrap = self._new_wrap()
        self._write(wrap.flush())

    def _new_wrap(self) -> WordWrap:
        return WordWrap(self._out.width if self._out.is_terminal else None)

    def _write(self, text: str) -> None:
        # Not Rich's print, which would wrap each piece as if it began a line.
        self._out.file.write(text)
        self._out.file.flush()
        self._ends_line = text.endswith("\n") if text else self._ends_line

    def _end_line(self) -> None:
        if not self._ends_line:
            self._write("\n")

    def _expert_is_gone(self) -> bool:
        try:
            return any(actor.state != "ready" for actor in self._served.read().actors)
        except MoERuntimeError:
            # The one who is asked may be away as well; then there is nothing to tell.
            return False

    def _keep(self, answer: Answer) -> None:
        if not answer.num_tokens:
            return
        self._end_line()
        self._conversation.add(answer.question, answer.text)
        self.answers.append(answer)
        self._note(summary(answer))

    def _tell_forgotten(self, prompt: Prompt) -> None:
        if prompt.num_forgotten:
            left_out, num_turns = prompt.num_forgotten, len(self._conversation.turns)
            self._note(
                f"left out the first {left_out} of {num_turns} questions and answers: the model looks back on "
                f"{self._conversation.context:,} tokens"
            )

    def _note(self, text: str) -> None:
        self._notes.print(Text(text, style="dim"))


def summary(answer: Answer) -> str:
    """How long an answer is and how fast it was, in one line."""
    tokens = "1 token" if answer.num_tokens == 1 else f"{answer.num_tokens:,} tokens"
    ending = {"end": "", "length": "; cut by --max-new-tokens", "stopped": "; stopped"}[answer.ending]
    return f"{tokens}, the first after {answer.first_token_s:.2f} s, then {answer.tokens_per_s:.1f} tokens/s{ending}"
