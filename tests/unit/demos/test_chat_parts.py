"""The chat's pure parts: what is put to the model, what is shown of its experts, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fakes.tiny_language_model import CONTEXT, tiny_tokenizer
from moe_runtime.demos.chat.answering import Answer
from moe_runtime.demos.chat.check import Comparison
from moe_runtime.demos.chat.conversation import Conversation
from moe_runtime.demos.chat.expected import keep_tokens, kept_tokens
from moe_runtime.demos.chat.heat_map import bar, heat_map
from moe_runtime.demos.chat.loads import Actor, Loads, Reading, max_over_mean
from moe_runtime.demos.chat.reading import reading_of
from moe_runtime.demos.chat.result import ChatResult
from moe_runtime.demos.chat.settings import ChatSettings
from moe_runtime.demos.chat.terminal import summary
from moe_runtime.demos.chat.word_wrap import WordWrap
from moe_runtime.demos.errors import DemoError
from moe_runtime.integrations.transformers import ActorView, ExpertsView, ExpertView, LayerView

TOKENIZER = tiny_tokenizer()


def decoded(conversation: Conversation, question: str) -> str:
    return str(TOKENIZER.decode(conversation.prompt(question, max_new_tokens=8).ids[0]))


def lines_of(loads: Loads, *, width: int, actors: tuple[Actor, ...] = ()) -> list[str]:
    console = Console(width=width, record=True, color_system=None, file=None, quiet=False)
    with console.capture() as capture:
        console.print(heat_map(loads, width=width, actors=actors))
    return [line.rstrip() for line in capture.get().splitlines()]


def answer_of(text: str, *token_ids: int) -> Answer:
    return Answer("why?", text, token_ids, num_prompt_tokens=7, seconds=2.5, first_token_s=0.5, ending="end")


def test_a_question_follows_the_system_prompt_and_what_was_said() -> None:
    conversation = Conversation(TOKENIZER, context=CONTEXT, system="be brief")
    conversation.add("a", "b")

    assert decoded(conversation, "c") == ("<system>be brief<end><user>a<end><assistant>b<end><user>c<end><assistant>")


def test_a_reset_conversation_has_forgotten_everything() -> None:
    conversation = Conversation(TOKENIZER, context=CONTEXT)
    conversation.add("a", "b")
    conversation.reset()

    assert conversation.turns == ()
    assert decoded(conversation, "c") == "<user>c<end><assistant>"


def test_the_oldest_turns_are_left_out_when_the_context_is_full_but_never_the_system_prompt() -> None:
    """The system prompt is 5 tokens, a turn 6 and the question 6: with two turns 23 of 24, with three 29."""
    conversation = Conversation(TOKENIZER, context=32, system="sys")
    for letter in "xyz":
        conversation.add(letter, letter)

    prompt = conversation.prompt("why", max_new_tokens=8)

    assert prompt.num_forgotten == 1
    assert TOKENIZER.decode(prompt.ids[0]) == (
        "<system>sys<end><user>y<end><assistant>y<end><user>z<end><assistant>z<end><user>why<end><assistant>"
    )


def test_an_answer_never_claims_more_than_half_of_the_context() -> None:
    conversation = Conversation(TOKENIZER, context=32)

    assert conversation.prompt("0123456789", max_new_tokens=1000).ids.shape == (1, 13)


def test_a_question_that_is_too_long_is_refused_with_its_length() -> None:
    conversation = Conversation(TOKENIZER, context=32)

    with pytest.raises(DemoError, match=r"at most 24 tokens.*context of 32; found 103"):
        conversation.prompt("x" * 100, max_new_tokens=8)


def test_a_template_that_refuses_a_system_prompt_says_why() -> None:
    picky = tiny_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x")

    assert Conversation(picky, context=CONTEXT).prompt("a", max_new_tokens=8).ids.shape == (1, 1)
    with pytest.raises(DemoError, match="chat template does not take what was said: no system"):
        Conversation(picky, context=CONTEXT, system="be brief").prompt("a", max_new_tokens=8)


def test_a_base_model_without_a_template_continues_the_text() -> None:
    base = tiny_tokenizer(None)
    conversation = Conversation(base, context=CONTEXT, system="unused")
    conversation.add("a", "b")

    assert base.decode(conversation.prompt("c", max_new_tokens=8).ids[0]) == "a\nb\nc"


def test_loads_are_what_came_since_an_earlier_reading() -> None:
    before = Loads({"a": (1, 2)})
    now = Loads({"a": (4, 2), "b": (5, 6)})

    assert now.since(before) == Loads({"a": (3, 0), "b": (5, 6)})


def test_loads_add_up_by_expert_also_where_layers_differ_in_size() -> None:
    assert Loads({"a": (1, 2), "b": (10, 20, 30)}).by_expert() == (11, 22, 30)
    assert Loads({}).by_expert() == ()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (("model.layers.0.mlp.experts", "model.layers.11.mlp.experts"), ["0", "11"]),
        (("encoder.0.mlp", "decoder.0.mlp"), ["encoder", "decoder"]),
        (("a.0.x", "a.1.y"), ["0.x", "1.y"]),
        (("model.layers.0.mlp.experts",), ["model.layers.0.mlp.experts"]),
    ],
)
def test_layers_are_called_by_what_tells_them_apart(names: tuple[str, ...], short: list[str]) -> None:
    assert list(Loads(dict.fromkeys(names, (1,))).short_names().values()) == short


@pytest.mark.parametrize(("counts", "ratio"), [((5, 5), 1.0), ((10, 0), 2.0), ((3, 1, 2), 1.5), ((0, 0), 0.0)])
def test_evenness_is_the_busiest_over_the_mean(counts: tuple[int, ...], ratio: float) -> None:
    assert max_over_mean(counts) == ratio


@pytest.mark.parametrize(("count", "shown"), [(0, " "), (1, "▁"), (50, "▄"), (51, "▅"), (100, "█")])
def test_only_an_idle_expert_has_no_bar(count: int, shown: str) -> None:
    assert bar(count, 100) == shown


def test_few_experts_are_shown_with_their_shares_layer_by_layer() -> None:
    loads = Loads({"l.0.e": (30, 10, 40, 0), "l.1.e": (20, 20, 20, 20), "l.2.e": (80, 0, 0, 0)})
    actors = (Actor(11, "ready", 0, (0, 1)), Actor(12, "starting", 2, (2, 3)))

    assert lines_of(loads, width=66, actors=actors) == [
        "layer    0    1    2    3  max÷mean",
        "    0  ▆38  ▂12  █50    0      2.00",
        "    1  █25  █25  █25  █25      1.00",
        "    2 █100    0    0    0      4.00",
        "",
        "per expert: its share of the layer's assignments, in %",
        "in all  240 assignments over 3 layers, max÷mean 2.17",
        "actor   pid 11: experts 0-1, 160 assignments",
        "actor   pid 12: experts 2-3, 80 assignments, starting, restarts 2",
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("num_layers", "num_experts"), [(30, 4), (1, 8), (27, 64), (48, 128), (3, 512)])
def test_every_model_fits_the_terminal_and_every_layer_is_shown(width: int, num_layers: int, num_experts: int) -> None:
    loads = Loads({f"model.layers.{layer}.e": tuple(range(1, num_experts + 1)) for layer in range(num_layers)})

    lines = lines_of(loads, width=width)

    assert max(map(len, lines)) <= width
    ratio = f"{max_over_mean(range(1, num_experts + 1)):.2f}"
    table = lines[: lines.index("")]
    assert sum(line.split().count(ratio) for line in table) == num_layers
    assert table[0].count("max÷mean") == -(-num_layers // (len(table) - 1))


def test_thirty_layers_of_four_experts_fit_a_small_terminal() -> None:
    loads = Loads(dict.fromkeys((f"model.layers.{layer}.mlp.experts" for layer in range(30)), (4, 3, 2, 1)))

    assert len(lines_of(loads, width=80)) <= 24


def test_many_experts_share_bars_and_the_busiest_of_each_is_shown() -> None:
    loads = Loads({"a.0": tuple(int(expert in {0, 41}) for expert in range(64)), "a.1": (1,) * 64})

    lines = lines_of(loads, width=48)

    assert lines[1].split() == ["0", "█", "█", "32.00"]
    assert "a bar is the busiest of 2 neighbours" in "\n".join(lines)


def test_before_the_first_question_there_is_nothing_to_show() -> None:
    assert lines_of(Loads({"a": (0, 0)}), width=80) == ["No expert has been asked yet."]


def test_words_go_to_the_next_line_whole() -> None:
    wrap = WordWrap(10)

    assert wrap.feed("the quick br") == "the quick"
    assert wrap.feed("own fox ") == "\nbrown fox"
    assert wrap.feed("\njumps") == "\n"
    assert wrap.flush() == "jumps"


def test_what_would_steer_the_terminal_is_left_out() -> None:
    assert WordWrap(80).feed("a\x1b[31mb\x07 \x9bc ") == "a[31mb c"


def test_without_an_edge_the_text_is_left_as_it_is() -> None:
    assert WordWrap(None).feed("a\x1b  b\n") == "a\x1b  b\n"


def test_scripts_without_blanks_are_not_held_back() -> None:
    wrap = WordWrap(10)

    assert wrap.feed("巴黎是") == "巴黎是"
    assert wrap.feed("法国的首都") == "\n法国的首都"


@given(st.lists(st.text("aij", min_size=1, max_size=9)), st.integers(1, 5))
def test_wrapping_moves_line_ends_only_and_keeps_to_the_width(words: list[str], size: int) -> None:
    text = " ".join(words)
    wrap = WordWrap(20)

    written = "".join(wrap.feed(text[start : start + size]) for start in range(0, len(text), size)) + wrap.flush()

    assert written.split() == words
    assert max(map(len, written.split("\n"))) <= 20


def test_actors_are_found_by_their_processes_with_the_experts_of_every_layer() -> None:
    def expert(place: int, count: int, pid: int | None) -> ExpertView:
        return ExpertView(place, count, (ActorView(f"r{place}", "ready", "node", pid, 1),))

    view = ExpertsView(
        layers=(
            LayerView("m.0", "x-m.0", (expert(0, 5, 71), expert(1, 6, 71), expert(2, 7, None))),
            LayerView("m.1", "x-m.1", (expert(0, 1, 71), expert(1, 2, 71), expert(2, 3, None))),
        ),
        num_dropped=0,
        num_retried=4,
    )

    assert reading_of(view) == Reading(
        Loads({"m.0": (5, 6, 7), "m.1": (1, 2, 3)}),
        (Actor(71, "ready", 1, (0, 1)), Actor(0, "ready", 1, (2,))),
        num_retried=4,
    )


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert answer_of("b", 1, 2, 3, 4, 5).tokens_per_s == pytest.approx(2.0)
    assert answer_of("b", 1).tokens_per_s == pytest.approx(0.4)
    assert summary(answer_of("b", 1, 2, 3, 4, 5)) == "5 tokens, the first after 0.50 s, then 2.0 tokens/s"


def test_the_result_has_the_answer_the_comparison_the_loads_and_the_times(tmp_path: Path) -> None:
    comparison = Comparison("p", (1, 2), (1, 2), "t", "t")
    experts = Reading(Loads({"m.0": (3, 4)}), (Actor(71, "ready", 0, (0, 1)),))
    result = ChatResult("m", tmp_path, (answer_of("b", 5, 2),), comparison, experts, {"starting": 1.5})

    result.write_json(tmp_path / "out.json")
    result.check()

    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["prompt"], written["answer"], written["token_ids"]) == ("why?", "b", [5, 2])
    assert written["tokens_per_s"] == 0.5
    assert written["tokens_equal_dense"] is True
    assert written["num_actors"] == 1
    assert written["loads"] == {"m.0": [3, 4]}
    assert written["start_s"] == {"starting": 1.5}
    assert [answer["answer"] for answer in written["answers"]] == ["b"]


def test_other_tokens_than_the_dense_models_fail_the_demo(tmp_path: Path) -> None:
    comparison = Comparison("p", (1, 2, 9), (1, 2, 3), "t", "u")
    result = ChatResult("m", tmp_path, (), comparison, Reading(Loads({})), {})

    assert result.as_json()["tokens_equal_dense"] is False
    with pytest.raises(DemoError, match="expected the dense model's tokens, found others after the first 2 of 3"):
        result.check()


def test_a_result_without_a_comparison_promises_nothing(tmp_path: Path) -> None:
    result = ChatResult("m", tmp_path, (), None, Reading(Loads({})), {})

    result.check()
    assert result.as_json()["tokens_equal_dense"] is None


def test_the_dense_models_tokens_are_kept_until_a_library_changes(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    assert kept_tokens(path) is None

    keep_tokens(path, (3, 1))
    assert kept_tokens(path) == (3, 1)
    assert list(tmp_path.iterdir()) == [path]

    path.write_text(path.read_text().replace('"torch": "', '"torch": "older-'))
    assert kept_tokens(path) is None
    path.write_text("{")
    assert kept_tokens(path) is None


def test_mistakes_are_found_before_anything_takes_time(tmp_path: Path) -> None:
    ChatSettings(json_path=tmp_path / "out.json").check()
    with pytest.raises(DemoError, match="--prompt: expected a question"):
        ChatSettings(prompt=" ").check()
    with pytest.raises(DemoError, match=r"--json .*expected an existing folder"):
        ChatSettings(json_path=tmp_path / "absent" / "out.json").check()
    with pytest.raises(DemoError, match=r"--checkpoint .*expected a folder with the config.json"):
        ChatSettings(checkpoint=tmp_path).check()
