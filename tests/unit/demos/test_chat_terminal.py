"""The conversation as a person has it, with a real model of transformers in this process."""

from __future__ import annotations

import _thread
import io
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console

from fakes.tiny_language_model import tiny_llama, tiny_tokenizer
from moe_runtime.demos.chat.answering import AnswerUnderWay
from moe_runtime.demos.chat.check import greedy_tokens
from moe_runtime.demos.chat.lines import piped_lines, typed_lines
from moe_runtime.demos.chat.loads import Actor, Loads, Reading
from moe_runtime.demos.chat.served import ServedModel
from moe_runtime.demos.chat.settings import Sampling
from moe_runtime.demos.chat.terminal import HELP, Terminal
from moe_runtime.errors import ExpertError, StartError

TOKENIZER = tiny_tokenizer()
#: Greedy, so that the random model never ends an answer by itself.
SAMPLING = Sampling(temperature=0.0, max_new_tokens=24)
READY = Reading(Loads({"m.0": (0, 0), "m.1": (0, 0)}), (Actor(11, "ready", 0, (0, 1)),))


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    """A random model, with one thread: it is too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_llama(TOKENIZER)
    torch.set_num_threads(before)


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def notes() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


@pytest.fixture
def terminal(model: torch.nn.Module, out: Console, notes: Console) -> Terminal:
    return make_terminal(model, out=out, notes=notes)


def make_terminal(
    model: torch.nn.Module,
    *,
    out: Console,
    notes: Console,
    sampling: Sampling = SAMPLING,
    read: Callable[[], Reading] = lambda: READY,
) -> Terminal:
    served = ServedModel("tiny", model, TOKENIZER, read)
    return Terminal(served, sampling=sampling, system=None, out=out, notes=notes)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def prompt_ids(text: str) -> torch.Tensor:
    return TOKENIZER(text, return_tensors="pt")["input_ids"]


def test_an_answer_is_what_generate_says_word_for_word(model: torch.nn.Module) -> None:
    ids = prompt_ids("<user>hello<end><assistant>")
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=TOKENIZER.pad_token_id)
    under_way = AnswerUnderWay(model, TOKENIZER, question="hello")

    under_way.start(ids, SAMPLING, context=256)
    pieces = list(under_way.pieces(silence_s=30.0))
    answer = under_way.answer()

    assert answer.token_ids == tuple(expected[0, ids.shape[1] :].tolist())
    assert "".join(pieces) == TOKENIZER.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.text == "".join(pieces).strip()
    assert (answer.question, answer.num_prompt_tokens, answer.ending) == ("hello", 8, "length")
    assert 0 < answer.first_token_s <= answer.seconds


def test_an_answer_ends_where_the_context_does(model: torch.nn.Module) -> None:
    ids = prompt_ids("abcdef")
    under_way = AnswerUnderWay(model, TOKENIZER, question="abcdef")

    under_way.start(ids, SAMPLING, context=10)
    list(under_way.pieces(silence_s=30.0))

    assert under_way.answer().num_tokens == 4


def test_a_token_that_ends_the_answer_is_no_text(model: torch.nn.Module) -> None:
    ending = tiny_llama(TOKENIZER)
    ending.lm_head.weight.data[TOKENIZER.eos_token_id] = 0.0
    ending.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(0), len(TOKENIZER)) * 99.0)
    under_way = AnswerUnderWay(ending, TOKENIZER, question="x")

    under_way.start(prompt_ids("x"), SAMPLING, context=256)
    list(under_way.pieces(silence_s=30.0))

    answer = under_way.answer()
    assert (answer.text, answer.token_ids, answer.ending) == ("", (TOKENIZER.eos_token_id,), "end")


def test_the_same_seed_draws_the_same_conversation_also_after_a_reset(
    model: torch.nn.Module, out: Console, notes: Console
) -> None:
    sampling = Sampling(temperature=1.5, max_new_tokens=12, seed=3)
    terminal = make_terminal(model, out=out, notes=notes, sampling=sampling)

    terminal.chat(["a", "b", "/reset", "a", "b"], keeps_on=True)

    first, second, third, fourth = (answer.token_ids for answer in terminal.answers)
    assert (first, second) == (third, fourth)
    other = make_terminal(model, out=out, notes=notes, sampling=Sampling(1.5, max_new_tokens=12, seed=4))
    assert other.ask("a").token_ids != first


def test_answers_go_out_and_figures_go_beside(terminal: Terminal, out: Console, notes: Console) -> None:
    terminal.chat(["hello\n", "\n", "  \n", "again\n", "/quit\n", "never asked\n"], keeps_on=True)

    texts = [answer.text for answer in terminal.answers]
    assert [answer.question for answer in terminal.answers] == ["hello", "again"]
    assert text_of(out).split() == " ".join(texts).split()
    assert text_of(out).endswith(texts[-1].rstrip() + "\n")
    assert text_of(notes).count("24 tokens, the first after ") == 2
    assert "cut by --max-new-tokens" in text_of(notes)


def test_what_was_said_is_part_of_the_next_prompt_until_it_is_reset(terminal: Terminal) -> None:
    terminal.chat(["hello", "why", "/reset", "why"], keeps_on=True)

    hello, why, alone = terminal.answers
    assert hello.num_prompt_tokens == len("hello") + 3
    # The answer is said again without the blanks around it.
    assert why.num_prompt_tokens == hello.num_prompt_tokens + len(hello.text) + 1 + len("why") + 3
    assert alone.num_prompt_tokens == len("why") + 3


def test_a_long_conversation_says_what_it_left_out(terminal: Terminal, notes: Console) -> None:
    terminal.chat(["x" * 100, "y" * 100, "z" * 100], keeps_on=True)

    assert len(terminal.answers) == 3
    assert "left out the first 1 of 2 questions and answers: the model looks back on 256" in text_of(notes)


def test_a_question_that_is_too_long_is_told_and_the_chat_goes_on(terminal: Terminal, notes: Console) -> None:
    terminal.chat(["x" * 300, "short"], keeps_on=True)

    assert [answer.question for answer in terminal.answers] == ["short"]
    assert "error: the question: expected at most 232 tokens" in text_of(notes)


def test_commands_help_and_mistyped_ones_are_explained(terminal: Terminal, out: Console, notes: Console) -> None:
    terminal.chat(["/help", "/expert"], keeps_on=True)

    assert text_of(out) == HELP + "\n"
    assert "/expert: expected /experts, /reset, /help or /quit" in text_of(notes)
    assert terminal.answers == []


def test_experts_shows_what_they_did_in_this_conversation(model: torch.nn.Module, out: Console, notes: Console) -> None:
    readings = iter([(100, 0), (101, 3)])
    terminal = make_terminal(
        model, out=out, notes=notes, read=lambda: Reading(Loads({"m.0": next(readings)}), READY.actors)
    )

    terminal.chat(["/experts"], keeps_on=True)

    assert "in all  4 assignments over 1 layer, max÷mean 1.50" in text_of(out)
    assert "pid 11: experts 0-1, 4 assignments" in text_of(out)


def test_experts_that_cannot_be_looked_at_do_not_end_the_chat(
    model: torch.nn.Module, out: Console, notes: Console
) -> None:
    asked = []

    def read() -> Reading:
        asked.append(None)
        if len(asked) > 1:
            raise StartError("the controller does not answer")
        return READY

    terminal = make_terminal(model, out=out, notes=notes, read=read)
    terminal.chat(["/experts", "hello"], keeps_on=True)

    assert "error: the controller does not answer" in text_of(notes)
    assert len(terminal.answers) == 1


class FailingAtToken(torch.nn.Module):
    """A layer that fails, or does something else, when it has seen so many tokens."""

    def __init__(self, num_tokens: int, what: Callable[[], None]) -> None:
        super().__init__()
        self.left = num_tokens
        self.what = what

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            self.what()
        return hidden


def disturbed(num_tokens: int, what: Callable[[], None]) -> torch.nn.Module:
    """A model in which something happens at a token."""
    model = tiny_llama(TOKENIZER)
    model.model.norm = torch.nn.Sequential(model.model.norm, FailingAtToken(num_tokens, what))
    return model


def test_an_expert_that_is_gone_for_good_ends_the_answer_and_not_the_chat(out: Console, notes: Console) -> None:
    def fail() -> None:
        raise ExpertError("expert 3: gone")

    terminal = make_terminal(disturbed(5, fail), out=out, notes=notes)
    terminal.chat(["hello", "again"], keeps_on=True)

    assert "error: expert 3: gone" in text_of(notes)
    broken, whole = terminal.answers
    assert (broken.num_tokens, whole.num_tokens) == (4, 24)
    with pytest.raises(ExpertError, match="gone"):
        make_terminal(disturbed(5, fail), out=out, notes=notes).ask("hello")


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(out: Console, notes: Console) -> None:
    terminal = make_terminal(
        disturbed(5, _thread.interrupt_main), out=out, notes=notes, sampling=Sampling(0.0, max_new_tokens=200)
    )

    terminal.chat(["hello", "why"], keeps_on=True)

    stopped, whole = terminal.answers
    assert stopped.ending == "stopped"
    assert 4 <= stopped.num_tokens < 200
    assert "; stopped" in text_of(notes)
    assert whole.num_prompt_tokens > stopped.num_prompt_tokens + len(stopped.text)
    assert whole.question == "why"


def test_ctrl_c_ends_a_chat_that_nobody_types_and_keeps_the_answer_so_far(out: Console, notes: Console) -> None:
    terminal = make_terminal(
        disturbed(5, _thread.interrupt_main), out=out, notes=notes, sampling=Sampling(0.0, max_new_tokens=200)
    )

    with pytest.raises(KeyboardInterrupt):
        terminal.chat(["hello", "never asked"], keeps_on=False)

    assert [answer.question for answer in terminal.answers] == ["hello"]


def test_the_check_prompt_is_continued_greedily(model: torch.nn.Module) -> None:
    ids = prompt_ids("The capital of France is")
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=TOKENIZER.pad_token_id)

    assert greedy_tokens(model, TOKENIZER) == tuple(expected[0, ids.shape[1] :].tolist())


def test_a_terminal_gets_lines_of_its_width_and_a_pipe_the_bare_text(model: torch.nn.Module, notes: Console) -> None:
    screen = Console(file=io.StringIO(), width=20, force_terminal=True, color_system="standard")
    pipe = Console(file=io.StringIO(), width=20)
    for out in (screen, pipe):
        make_terminal(model, out=out, notes=notes).ask("hello")

    assert "".join(text_of(screen).split()) == "".join(text_of(pipe).split())
    assert "\x1b" not in text_of(pipe)


def test_lines_are_read_from_a_pipe_one_by_one(monkeypatch: pytest.MonkeyPatch, out: Console) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))

    assert list(piped_lines(out)) == ["one\n", "\n", "two"]
    assert text_of(out) == ""


def test_piped_questions_are_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n"))
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None)

    assert list(piped_lines(screen)) == ["one\n", "\n"]
    assert text_of(screen) == "> one\n"


def test_ctrl_d_ends_what_is_typed_and_the_prompt_stays_out_of_the_answers(
    monkeypatch: pytest.MonkeyPatch, notes: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))

    assert list(typed_lines(notes)) == ["one", "two"]
    assert text_of(notes) == "> > > \n"
    assert capsys.readouterr().out == ""
