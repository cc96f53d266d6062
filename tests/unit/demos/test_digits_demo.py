"""The demo from its first line to its last; experts and router are threads of this process."""

from __future__ import annotations

import _thread
import io
import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.demos.digits import artifacts, run
from moe_runtime.demos.digits.commands import call_command, serve_command
from moe_runtime.demos.digits.recipe import Recipe
from moe_runtime.demos.digits.traffic import Load
from moe_runtime.demos.digits.training import DigitsLayer
from moe_runtime.demos.errors import DemoError
from moe_runtime.launch.runtime import serve

# Some of these train for real, on machines that may have other things to do.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False)


@pytest.fixture
def hasty_recipe(short_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose training cannot reach the promised accuracy, with a cache of this test's own."""
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    return replace(short_recipe, num_epochs=1)


@pytest.fixture
def cached(short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder in a cache of this test's own, with the trained layer in it."""
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    folder = artifacts.folder_of(short_recipe)
    artifacts.save(trained, short_recipe, folder)
    return folder


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_demo_trains_serves_calls_checks_and_reports(
    console: Console, short_recipe: Recipe, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    json_path = tmp_path / "result.json"

    result = run(json_path=json_path, console=console, recipe=short_recipe, load=load, ray=False)

    assert result.training_s is not None
    assert result.config_path == artifacts.folder_of(short_recipe) / "config.yaml"
    assert json.loads(json_path.read_text())["accuracy"] == result.accuracy >= 0.96
    for word in ("Training", "Starting", "Classifying", "transformer", "p99", "tokens/s", "moe-runtime"):
        assert word in text_of(console)


def test_a_trained_layer_is_taken_from_the_cache(
    cached: Path, console: Console, short_recipe: Recipe, load: Load
) -> None:
    result = run(console=console, recipe=short_recipe, load=load, ray=False)

    assert result.training_s is None
    assert "done before" in text_of(console)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_layer_is_trained_again_when_asked_for_or_damaged(
    fresh: bool, console: Console, hasty_recipe: Recipe, trained: DigitsLayer, load: Load
) -> None:
    """The cached layer is good; that the demo fails shows that the hasty one took its place."""
    folder = artifacts.folder_of(hasty_recipe)
    artifacts.save(trained, hasty_recipe, folder)
    if not fresh:
        (folder / "conv-0.safetensors").write_bytes(b"damaged")

    with pytest.raises(DemoError, match="accuracy"):
        run(fresh=fresh, console=console, recipe=hasty_recipe, load=load, ray=False)

    assert ("cannot be used" in text_of(console)) is not fresh
    artifacts.load(hasty_recipe, folder)


def test_a_missing_plug_in_is_named_with_the_command_that_installs_it(console: Console, short_recipe: Recipe) -> None:
    recipe = replace(
        short_recipe,
        config_text=short_recipe.config_text.replace("[moe-runtime-example-expert]", "[moe-runtime-absent-expert]"),
    )

    with pytest.raises(DemoError, match=r"pip install \./examples/custom_expert"):
        run(console=console, recipe=recipe, ray=False)


def test_a_folder_that_is_not_there_is_found_out_before_the_work(
    console: Console, short_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DemoError, match=r"--json .*expected an existing folder"):
        run(json_path=tmp_path / "absent" / "result.json", console=console, recipe=short_recipe, ray=False)

    (tmp_path / "file").touch()
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "file"))
    with pytest.raises(DemoError, match="set MOE_RUNTIME_CACHE to another folder"):
        run(console=console, recipe=short_recipe, ray=False)

    assert text_of(console) == ""


def test_results_are_shown_and_written_even_when_they_fail_the_demo(
    console: Console, hasty_recipe: Recipe, load: Load, tmp_path: Path
) -> None:
    with pytest.raises(DemoError, match="accuracy"):
        run(json_path=tmp_path / "result.json", console=console, recipe=hasty_recipe, load=load, ray=False)

    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] < 0.96
    assert "all together" in text_of(console)


class CtrlC(io.StringIO):
    """A terminal before which somebody presses Ctrl-C as soon as a word appears."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word
        self.pressed = False

    def write(self, text: str) -> int:
        if self.word in text and not self.pressed:
            self.pressed = True
            _thread.interrupt_main()
        return super().write(text)


def test_ctrl_c_while_training_leaves_no_half_cache(
    short_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    terminal = Console(file=CtrlC("Training"), force_terminal=True, width=100)

    with pytest.raises(KeyboardInterrupt):
        run(console=terminal, recipe=replace(short_recipe, num_epochs=100_000), ray=False)

    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("word", ["Starting", "Classifying"])
def test_ctrl_c_while_serving_leaves_nothing_running(word: str, cached: Path, short_recipe: Recipe) -> None:
    terminal = Console(file=CtrlC(word), force_terminal=True, width=100)

    with pytest.raises(KeyboardInterrupt):
        run(console=terminal, recipe=short_recipe, load=Load(num_rounds=2000), ray=False)

    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("demo-", "moe-"))]
    assert left == []
    assert cached.exists()


def test_the_printed_python_command_classifies_the_first_images(cached: Path) -> None:
    with serve(cached / "config.yaml", ray=False, address="127.0.0.1:0") as runtime:
        finished = subprocess.run(
            ["bash", "-c", call_command(runtime.address)], capture_output=True, text=True, timeout=50, check=False
        )

    assert finished.stderr == ""
    digits, answers, experts = finished.stdout.splitlines()
    assert digits == "digits  [0 1 2 3 4 5 6 7]"
    assert answers.startswith("answers [0 1 2 3 4 ")
    assert len(json.loads(experts.removeprefix("experts "))) == 8


def test_the_printed_serve_command_quotes_the_path() -> None:
    assert serve_command(Path("/my caches/config.yaml")).endswith(" serve '/my caches/config.yaml'")
