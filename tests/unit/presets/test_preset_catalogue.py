from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from moe_runtime.config.load import load_config, without_presets
from moe_runtime.config.models import LayerConfig
from moe_runtime.config.presets.catalogue import PRESETS, find_preset, with_preset
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.config.yaml_file import as_yaml
from moe_runtime.errors import ConfigError

#: Every system that a reader of a survey may look for.
SYSTEMS = [
    "jacobs_1991",
    "eigen_2013",
    "shazeer_2017",
    "multimodel",
    "gshard",
    "switch",
    "glam",
    "base_layers",
    "hash_layers",
    "expert_choice",
    "vmoe",
    "diffusion_moe",
    "st_moe",
    "nllb",
    "mixtral",
    "dbrx",
    "megablocks",
    "openmoe",
    "olmoe",
    "deepseek_moe",
    "deepseek_v3",
    "qwen2_moe",
    "qwen3_moe",
    "phi_moe",
    "gpt_oss",
    "llama4",
    "mmoe",
]


def small_layer(name: str) -> dict[str, object]:
    """A layer of the preset that keeps the number of its experts, but not their size."""
    blocks = [{**block, "options": {"hidden_features": 4}} for block in PRESETS[name].layer["experts"]]
    return {"preset": name, "item_shape": [16], "experts": blocks}


def loaded(layer: dict[str, object]) -> RuntimeConfig:
    return load_config({"layers": {"a": layer}}).config


def test_every_system_has_its_preset() -> None:
    assert sorted(PRESETS) == sorted(SYSTEMS)
    assert [preset.year for preset in PRESETS.values()] == sorted(preset.year for preset in PRESETS.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_says_where_it_comes_from_what_it_computes_and_how_large_it_is(name: str) -> None:
    preset = find_preset(name)
    assert preset.name == name
    assert preset.source.startswith("https://")
    assert all(text.endswith(".") for text in (preset.about, preset.figures, preset.differs))
    assert preset.formula


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_and_the_shape_of_a_token_are_a_whole_layer(name: str) -> None:
    layer = LayerConfig.model_validate({"preset": name, "item_shape": [16]})
    for key, block in PRESETS[name].layer.items():
        value = layer.model_dump(mode="json", exclude_unset=True)[key]
        assert value == block


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_plain_configuration_loads_to_the_same_one(name: str) -> None:
    config = loaded(small_layer(name))
    text = as_yaml(without_presets(config))
    assert "preset" not in text
    plain = load_config(yaml.safe_load(text)).config
    assert plain.layers["a"] == config.layers["a"].model_copy(update={"preset": None})
    assert plain.model_dump(exclude={"layers"}) == config.model_dump(exclude={"layers"})


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_configuration_that_is_dumped_and_checked_again_stays_the_same(name: str) -> None:
    config = loaded(small_layer(name))
    assert RuntimeConfig.model_validate(config.model_dump()) == config


def test_the_keys_of_the_layer_win_and_blocks_of_the_same_kind_are_merged() -> None:
    layer = loaded(
        {
            "preset": "deepseek_v3",
            "item_shape": [16],
            "gate": {"jitter_eps": 0.5},
            "policy": {"k": 2, "groups": {"keep": 2}},
            "residual": "add",
        }
    ).layers["a"]
    assert layer.preset == "deepseek_v3"
    assert (layer.gate.kind, layer.gate.jitter_eps, layer.residual) == ("linear", 0.5, "add")
    assert layer.policy.model_dump() == {
        "kind": "top_k",
        "k": 2,
        "score": "sigmoid",
        "normalize": "before_drop",
        "norm_p": 1.0,
        "scaling_factor": 2.5,
        "expert_bias": True,
        "groups": {"count": 8, "keep": 2, "score": "top2_sum"},
    }
    assert (layer.num_experts, layer.losses.sequence) == (256, 1e-4)


def test_a_block_of_another_kind_and_a_list_replace_those_of_the_preset() -> None:
    layer = loaded(
        {
            "preset": "shazeer_2017",
            "item_shape": [16],
            "gate": {"kind": "mlp", "hidden_features": 8},
            "policy": {"kind": "switch"},
            "experts": [{"kind": "conv"}, {"kind": "recurrent"}],
        }
    ).layers["a"]
    assert layer.gate.model_dump(exclude_unset=True) == {"kind": "mlp", "hidden_features": 8}
    assert layer.policy.kind == "switch"
    assert [block.kind for block in layer.experts] == ["conv", "recurrent"]
    assert layer.losses.importance == 0.01


def test_merging_changes_neither_the_layer_nor_the_preset() -> None:
    layer = {"preset": "mixtral", "item_shape": [16], "policy": {"k": 1}}
    merged = with_preset(layer)
    assert merged["policy"]["k"] == 1
    assert layer["policy"] == {"k": 1}
    assert PRESETS["mixtral"].layer["policy"]["k"] == 2
    assert with_preset({"item_shape": [16]}) == {"item_shape": [16]}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"preset": "deepseek"}, "layers.a.preset: there is no 'deepseek'; did you mean deepseek_v3 or deepseek_moe?"),
        ({"preset": "switsh"}, "layers.a.preset: there is no 'switsh'; did you mean switch?"),
        ({"preset": "xyz"}, f"layers.a.preset: there is no 'xyz'; known are {', '.join(PRESETS)}"),
        (
            {"preset": "olmoe", "experts": [{"kind": "swiglu", "count": 4}]},
            "layers.a.policy.k: expected at most 4, the layer's experts, found 8 (from preset olmoe)",
        ),
        (
            {"preset": "olmoe", "policy": {"k": 65}},
            "layers.a.policy.k: expected at most 64, the layer's experts, found 65",
        ),
        ({"preset": "olmoe", "gates": {}}, "layers.a.gates: unknown key; did you mean gate?"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_preset_where_the_value_is_its(
    layer: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded({"item_shape": [16], **layer})
    assert str(caught.value) == message


def test_a_preset_that_is_no_text_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"layers\.a\.preset: expected a text, found 3"):
        loaded({"preset": 3, "item_shape": [16], "experts": [{"kind": "x"}]})


def test_presets_load_without_torch_or_yaml() -> None:
    check = (
        "import sys; import moe_runtime.config.presets.catalogue; "
        "print(sorted({'yaml', 'torch', 'ray', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
