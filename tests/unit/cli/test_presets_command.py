from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.config.load import load_config
from moe_runtime.config.presets.catalogue import PRESETS

CONFIG = """
name: small
layers:
  plain:
    item_shape: [8]
    timeout_ms: 500
    experts: [{kind: identity, count: 2}]
  known:
    preset: qwen2_moe
    item_shape: [8]
    policy: {k: 2}
    experts: [{kind: swiglu, count: 4, options: {hidden_features: 4}}]
    shared_experts: [{kind: swiglu, options: {hidden_features: 8}}]
router: {address: "127.0.0.1:0"}
"""


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_presets_lists_every_system_with_its_year_policy_capacity_and_losses() -> None:
    lines = run("presets").splitlines()
    for name, preset in PRESETS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert str(preset.year) in line
        assert preset.title in line
        assert preset.layer["policy"]["kind"] in line
    [deepseek] = [line for line in lines if line.split()[:1] == ["deepseek_v3"]]
    assert "top_k, k = 8, sigmoid, 4 of 8 groups, expert bias, 1 shared" in deepseek
    assert "sequence 0.0001" in deepseek


def test_presets_shows_one_with_its_formula_figures_and_keys() -> None:
    text = run("presets", "olmoe")
    preset = PRESETS["olmoe"]
    for part in (preset.title, preset.source, preset.about, preset.formula, preset.figures, preset.differs):
        assert part in text
    _, _, keys = text.partition("preset: olmoe in a layer stands for\n")
    assert yaml.safe_load(keys) == preset.layer


def test_presets_gives_all_or_one_as_json() -> None:
    assert [each["name"] for each in json.loads(run("presets", "--json"))] == list(PRESETS)
    [one] = json.loads(run("presets", "nllb", "--json"))
    assert one["layer"] == PRESETS["nllb"].layer


def test_presets_of_an_unknown_name_suggests_the_nearest() -> None:
    result = CliRunner().invoke(app, ["presets", "mixtrl"], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: preset: there is no 'mixtrl'; did you mean mixtral?"


def test_validate_expand_prints_a_configuration_that_loads_to_the_same_one(config: Path) -> None:
    text = run("validate", "--expand", str(config))
    expected, found = load_config(config).config, load_config(yaml.safe_load(text)).config
    assert "preset" not in text
    known = expected.layers["known"].model_copy(update={"preset": None})
    assert found == expected.model_copy(update={"layers": {**expected.layers, "known": known}})


def test_validate_expand_writes_out_the_preset_and_leaves_defaults_out(config: Path) -> None:
    plain = yaml.safe_load(run("validate", "--expand", str(config)))
    assert plain["layers"]["plain"] == {
        "item_shape": [8],
        "timeout_ms": 500.0,
        "experts": [{"kind": "identity", "count": 2}],
    }
    assert plain["layers"]["known"]["policy"] == {"kind": "top_k", "k": 2, "score": "softmax", "normalize": "none"}
    assert plain["layers"]["known"]["shared_gate"] == "sigmoid"


def test_validate_expand_refuses_what_validate_refuses(config: Path) -> None:
    config.write_text(CONFIG.replace("count: 4", "count: 1"), encoding="utf-8")
    result = CliRunner().invoke(app, ["validate", "--expand", str(config)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "layers.known.policy.k: expected at most 1, the layer's experts, found 2" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "experts: [{kind: swiglu, count: 20}]",
            "policy.groups.count: expected a divisor of the layer's 20 experts, found 8 (from preset deepseek_v3)",
        ),
        (
            "experts: [{kind: swiglu, count: 8}]",
            "policy.k: expected at most the 4 experts of the groups kept, found 8 (from preset deepseek_v3)",
        ),
        ("policy: {groups: {count: 7}}", "policy.groups.count: expected a divisor of the layer's 256 experts, found 7"),
    ],
)
def test_validate_names_the_preset_whose_groups_do_not_fit(tmp_path: Path, changes: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"layers: {{a: {{preset: deepseek_v3, item_shape: [8], {changes}}}}}", encoding="utf-8")
    result = CliRunner().invoke(app, ["validate", str(path)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert result.stderr.strip() == f"error: config.yaml: layers.a.{message}"
