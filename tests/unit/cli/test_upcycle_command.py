from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.integrations.transformers.upcycling import checkpoint

RUNNER = CliRunner()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*arguments: object) -> tuple[int, str]:
    done = RUNNER.invoke(app, ["upcycle", *map(str, arguments)])
    return done.exit_code, re.sub(r"\s+", " ", done.output)


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_a_mixture_of_four_experts_is_made_by_default(dense: Path, tmp_path: Path) -> None:
    code, output = run(dense, tmp_path / "moe")
    assert code == 0, output
    assert f"{tmp_path / 'moe'}: 4 experts per layer, top-2; 0.00 GB in 1 file" in output
    config = config_of(tmp_path / "moe")
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 4, 2)


def test_every_option_reaches_the_mixture(dense: Path, tmp_path: Path) -> None:
    options = "--experts 3 --top-k 1 --shared --noise 0.1 --gate-init zeros --gate-std 0.5 --seed 9 --dtype bfloat16"
    code, output = run(dense, tmp_path / "moe", *options.split(), "--max-shard-size", "2KB")
    assert code == 0, output
    made = json.loads((tmp_path / "moe" / "upcycled.json").read_text())["options"]
    assert made == {
        "experts": 3, "top_k": 1, "shared": True, "noise": 0.1, "gate_init": "zeros", "gate_std": 0.5, "seed": 9,
        "dtype": "bfloat16", "max_shard_bytes": 2000,
    }  # fmt: skip
    config = config_of(tmp_path / "moe")
    assert (config["model_type"], config["num_experts"], config["dtype"]) == ("qwen2_moe", 3, "bfloat16")
    assert re.search(r"in \d files", output)


@pytest.mark.parametrize(
    ("size", "expected"), [("200MB", 200_000_000), ("1.5GiB", 1_610_612_736), ("4096", 4096), ("2 kb", 2000)]
)
def test_sizes_have_units(size: str, expected: int, dense: Path, tmp_path: Path) -> None:
    assert run(dense, tmp_path / "moe", "--max-shard-size", size)[0] == 0
    assert json.loads((tmp_path / "moe" / "upcycled.json").read_text())["options"]["max_shard_bytes"] == expected


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1GB", "1e9"])
def test_a_size_that_is_none_is_refused(size: str, dense: Path, tmp_path: Path) -> None:
    code, output = run(dense, tmp_path / "moe", f"--max-shard-size={size}")
    assert code == 2
    assert "expected a size like 5GB or 200MB" in output


def test_a_mistake_is_one_line_and_exit_code_1(dense: Path, tmp_path: Path) -> None:
    code, output = run(dense, tmp_path / "moe", "--experts", 2, "--top-k", 3)
    assert code == 1
    assert "error: top_k: expected 1 to 2, the number of experts; found 3" in output
    assert "Traceback" not in output


def test_a_model_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    code, output = run(tmp_path / "nowhere", tmp_path / "moe")
    assert code == 2
    assert "does not exist" in output


def test_force_replaces_what_the_command_made(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe")
    code, output = run(dense, tmp_path / "moe", "--experts", 2)
    assert code == 1
    assert "found a folder; --force replaces it" in output
    assert run(dense, tmp_path / "moe", "--experts", 2, "--force")[0] == 0
    assert config_of(tmp_path / "moe")["num_local_experts"] == 2


def test_an_environment_without_transformers_says_what_to_install(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, output = run(dense, tmp_path / "moe")
    assert code == 1
    assert "expected gguf to be installed: pip install 'moe-runtime[transformers]'" in output


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_midway_leaves_nothing(
    ending: signal.Signals, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards = checkpoint.write_shards
    found_midway: list[Path] = []

    def end_midway(folder: Path, *arguments: Any, **options: Any) -> Iterator[int]:
        for number, size in enumerate(write_shards(folder, *arguments, **options)):
            if number == 5:
                found_midway.extend(folder.glob("*.safetensors"))
                os.kill(os.getpid(), ending)
            yield size

    monkeypatch.setattr(checkpoint, "write_shards", end_midway)
    before = signal.getsignal(signal.SIGTERM)
    code, output = run(dense, tmp_path / "moe")
    assert code == 128 + ending
    assert "Traceback" not in output
    assert found_midway
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_shards_hold_every_tensor_once(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe", "--max-shard-size", "2KB")
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())["weight_map"]
    for path in (tmp_path / "moe").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {index.pop(name) for name in file.keys()} == {path.name}  # noqa: SIM118  # no mapping
    assert index == {}
