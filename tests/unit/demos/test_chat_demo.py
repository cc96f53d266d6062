"""The chat from its first line to its last, with a tiny mixture; its experts are threads of this process."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fakes.tiny_language_model import tiny_llama, tiny_mixture, tiny_tokenizer
from moe_runtime.config.state_folder import STATE_FOLDER_VARIABLE
from moe_runtime.demos.chat import ChatSettings, Sampling, run
from moe_runtime.demos.errors import DemoError
from moe_runtime.errors import UnsupportedModelError

SAMPLING = Sampling(temperature=0.0, max_new_tokens=6)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_FOLDER_VARIABLE, str(tmp_path / "state"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 4 experts in 2 layers, with its tokenizer."""
    return tiny_mixture(tmp_path_factory.mktemp("chat") / "tiny-mixture")


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def notes() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_prompt_is_answered_and_everything_about_it_written(
    checkpoint: Path, out: Console, notes: Console, tmp_path: Path
) -> None:
    settings = ChatSettings(
        prompt="hello",
        json_path=tmp_path / "out.json",
        checkpoint=checkpoint,
        experts_per_actor=2,
        sampling=SAMPLING,
    )

    result = run(settings, out=out, notes=notes, ray=False)

    (answer,) = result.answers
    assert text_of(out).strip() == answer.text
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["prompt"], written["answer"], written["model"]) == ("hello", answer.text, "tiny-mixture")
    assert written["tokens_equal_dense"] is None
    # The prompt's 8 tokens, and those of the answer but the last, each by 2 experts.
    assert [sum(counts) for counts in written["loads"].values()] == [2 * (8 + answer.num_tokens - 1)] * 2
    assert set(written["start_s"]) == {"importing", "starting", "loading"}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("moe-", "chat-"))] == []


def test_a_conversation_shows_the_load_of_every_layer(checkpoint: Path, out: Console, notes: Console) -> None:
    settings = ChatSettings(checkpoint=checkpoint, sampling=SAMPLING)

    result = run(settings, out=out, notes=notes, ray=False, lines=["hello", "/experts", "/quit"])

    assert len(result.answers) == 1
    assert f"in all  {4 * (8 + result.answers[0].num_tokens - 1)} assignments over 2 layers" in text_of(out)
    for word in ("Starting expert actors", "tiny-mixture", "/help", "tokens/s"):
        assert word in text_of(notes)


def test_a_checkpoint_without_experts_is_refused_in_words(out: Console, notes: Console, tmp_path: Path) -> None:
    tiny_llama(tiny_tokenizer()).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match="expert"):
        run(ChatSettings(checkpoint=tmp_path, prompt="x"), out=out, notes=notes, ray=False)


def test_a_mistake_is_told_before_anything_is_shown(out: Console, notes: Console, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"--json .*expected an existing folder"):
        run(ChatSettings(json_path=tmp_path / "absent" / "out.json"), out=out, notes=notes, ray=False)

    assert text_of(notes) == ""
