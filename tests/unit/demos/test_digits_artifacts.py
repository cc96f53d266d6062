from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_runtime.demos.digits import artifacts
from moe_runtime.demos.digits.recipe import Recipe
from moe_runtime.demos.digits.training import DigitsLayer
from moe_runtime.errors import WeightsError
from moe_runtime.experts.weights import load_weights

WEIGHT_FILES = [
    "conv-0.safetensors",
    "feed_forward-0.safetensors",
    "fourier-0.safetensors",
    "gate.safetensors",
    "recurrent-0.safetensors",
    "transformer-0.safetensors",
]


def interrupt(*_args: object) -> None:
    raise KeyboardInterrupt


def test_a_saved_layer_comes_back_bit_for_bit(short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path) -> None:
    artifacts.save(trained, short_recipe, tmp_path / "digits")
    loaded = artifacts.load(short_recipe, tmp_path / "digits")

    weights, expected = loaded.state_dict(), trained.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not loaded.training


def test_the_folder_holds_one_weight_file_per_expert_the_gate_a_manifest_and_the_config(
    short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path
) -> None:
    folder = tmp_path / "digits"
    artifacts.save(trained, short_recipe, folder)

    assert sorted(path.name for path in folder.iterdir()) == sorted([*WEIGHT_FILES, "config.yaml", "manifest.json"])
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == WEIGHT_FILES
    assert list(tmp_path.iterdir()) == [folder]


def test_each_expert_s_file_holds_a_golden_probe_that_it_passes(
    short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path
) -> None:
    artifacts.save(trained, short_recipe, tmp_path / "digits")

    for name, expert in zip(trained.names, trained.experts, strict=True):
        probe = load_weights(tmp_path / "digits" / f"{name}.safetensors").probe
        assert probe is not None
        assert probe.mistake(expert) is None
    assert load_weights(tmp_path / "digits" / "gate.safetensors").probe is None


def test_interrupted_saving_leaves_nothing(short_recipe: Recipe, tmp_path: Path) -> None:
    layer = DigitsLayer(short_recipe)
    layer.experts[2].register_state_dict_pre_hook(interrupt)

    with pytest.raises(KeyboardInterrupt):
        artifacts.save(layer, short_recipe, tmp_path / "digits")

    assert list(tmp_path.iterdir()) == []


def test_interrupted_saving_leaves_the_layer_that_was_there(
    short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path
) -> None:
    artifacts.save(trained, short_recipe, tmp_path / "digits")
    layer = DigitsLayer(short_recipe)
    layer.experts[2].register_state_dict_pre_hook(interrupt)

    with pytest.raises(KeyboardInterrupt):
        artifacts.save(layer, short_recipe, tmp_path / "digits")

    kept = artifacts.load(short_recipe, tmp_path / "digits")
    assert torch.equal(kept.gate.state_dict()["weight"], trained.gate.state_dict()["weight"])


def test_saving_again_replaces_the_layer(short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path) -> None:
    artifacts.save(DigitsLayer(short_recipe), short_recipe, tmp_path / "digits")
    artifacts.save(trained, short_recipe, tmp_path / "digits")

    loaded = artifacts.load(short_recipe, tmp_path / "digits")
    assert torch.equal(loaded.gate.state_dict()["weight"], trained.gate.state_dict()["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize("name", ["conv-0.safetensors", "gate.safetensors"])
def test_a_corrupt_weight_file_is_refused(
    name: str, short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path
) -> None:
    artifacts.save(trained, short_recipe, tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)

    with pytest.raises(WeightsError, match=name):
        artifacts.load(short_recipe, tmp_path)


@pytest.mark.parametrize("name", ["conv-0.safetensors", "config.yaml"])
def test_a_missing_file_is_named(name: str, short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path) -> None:
    artifacts.save(trained, short_recipe, tmp_path)
    (tmp_path / name).unlink()

    with pytest.raises(WeightsError, match=name):
        artifacts.load(short_recipe, tmp_path)


def test_a_config_that_was_edited_is_not_the_recipes(
    short_recipe: Recipe, trained: DigitsLayer, tmp_path: Path
) -> None:
    artifacts.save(trained, short_recipe, tmp_path)
    (tmp_path / "config.yaml").write_text(short_recipe.config_text.replace("k: 2", "k: 1"))

    with pytest.raises(WeightsError, match=r"config\.yaml"):
        artifacts.load(short_recipe, tmp_path)


@pytest.mark.parametrize(
    ("environ", "parent"),
    [
        ({"MOE_RUNTIME_CACHE": "/caches/moe", "XDG_CACHE_HOME": "/caches"}, Path("/caches/moe")),
        ({"XDG_CACHE_HOME": "/caches"}, Path("/caches/moe_runtime")),
        ({}, Path.home() / ".cache" / "moe_runtime"),
    ],
)
def test_the_cache_folder_follows_the_environment(environ: dict[str, str], parent: Path) -> None:
    recipe = Recipe()

    assert artifacts.folder_of(recipe, environ) == parent / f"digits-{recipe.key}"
    assert artifacts.folder_of(replace(recipe, seed=1), environ) != parent / f"digits-{recipe.key}"
