from __future__ import annotations

import pickle

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError, PlugInError, WeightsError
from moe_runtime.experts.build import initial_module
from moe_runtime.experts.weights import save_weights, write_manifest
from moe_runtime.launch.build import build_layers, validate
from moe_runtime.launch.gates import load_gate
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.routing.gate import GateShape

FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 4}}


def config(experts, **layer):
    return {"layers": {"l": {"item_shape": [6], "experts": experts, **layer}}}


def build(data):
    return build_layers(load_config(data))


def names(data):
    return [expert.spec.name for expert in build(data)[0].experts]


def mistakes(data):
    with pytest.raises(ConfigError) as caught:
        build(data)
    return str(caught.value).splitlines()


def test_experts_without_names_are_numbered_by_kind_around_the_names_given():
    data = config(
        [
            FEED_FORWARD,
            {**FEED_FORWARD, "name": "feed_forward-1"},
            {**FEED_FORWARD, "count": 2},
            {**FEED_FORWARD, "name": "tail", "count": 2},
        ]
    )
    assert names(data) == [
        "feed_forward-0", "feed_forward-1", "feed_forward-2", "feed_forward-3", "tail-0", "tail-1"
    ]  # fmt: skip
    assert [expert.spec.expert_id for expert in build(data)[0].experts] == [0, 1, 2, 3, 4, 5]


def test_two_experts_of_one_name_are_a_mistake():
    data = config([{**FEED_FORWARD, "name": "a-1"}, {**FEED_FORWARD, "name": "a", "count": 2}])
    assert mistakes(data) == [
        "layers.l.experts.1.name: expected a name that no other expert of the layer has, found 'a-1', "
        "which experts.0 has"
    ]


def test_weights_of_a_count_take_the_index_within_it_relative_to_the_file(tmp_path):
    first = build(config([{**FEED_FORWARD, "count": 2}]))[0]
    for i, expert in enumerate(first.experts):
        save_weights(tmp_path / f"ff-{i}.safetensors", initial_module(expert.spec).state_dict())
    path = tmp_path / "config.yaml"
    path.write_text(
        "layers:\n  l:\n    item_shape: [6]\n    experts:\n"
        "      - {kind: feed_forward, count: 2, weights: 'ff-{i}.safetensors', "
        "options: {hidden_features: 8, out_features: 4}}\n"
    )
    (layer,) = build_layers(load_config(path))
    assert [expert.spec.weights for expert in layer.experts] == [
        str(tmp_path / "ff-0.safetensors"),
        str(tmp_path / "ff-1.safetensors"),
    ]


def test_every_mistake_is_told_at_once_with_its_key():
    data = config(
        [
            {"kind": "feed_forward", "options": {"hidden_features": "many", "out_features": 4}},
            {"kind": "feed_forwrad", "options": {}},
            {**FEED_FORWARD, "weights": "nowhere.safetensors"},
        ],
        gate={"kind": "linear", "weights": "no-gate.safetensors"},
        residual="add",
    )
    lines = mistakes(data)
    for start in (
        "layers.l.experts.0.options.hidden_features: ",
        "layers.l.experts.1: ",
        "layers.l.experts.2.weights: ",
        "layers.l.gate.weights: ",
        "layers.l.residual: expected none, found add: ",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_mistake_in_a_block_of_many_is_told_once():
    data = config([{"kind": "feed_forward", "count": 5, "options": {"hidden_features": 0}}])
    assert len(mistakes(data)) == 1


def test_experts_that_disagree_on_their_output_shape_are_a_mistake():
    other = {"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 5}}
    assert mistakes(config([FEED_FORWARD, other])) == [
        "layers.l.experts.1: expected output rows of shape [4], which layers.l.experts.0 gives, found [5]"
    ]


def test_a_residual_that_adds_needs_equal_shapes():
    assert mistakes(config([{**FEED_FORWARD, "count": 2}], residual="add")) == [
        "layers.l.residual: expected none, found add: tokens have shape [6], outputs [4]"
    ]


@pytest.mark.parametrize(("out_features", "expected"), [(6, "passthrough"), (4, "none")])
def test_the_residual_is_passthrough_where_shapes_agree_unless_told_otherwise(out_features, expected):
    expert = {"kind": "feed_forward", "count": 2, "options": {"hidden_features": 8, "out_features": out_features}}
    assert build(config([expert]))[0].residual == expected


def test_weights_that_do_not_fit_are_told_with_file_and_tensor(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"wrong": torch.zeros(2)})
    data = config([{**FEED_FORWARD, "weights": str(path)}], policy={"kind": "switch"})
    with pytest.raises(WeightsError, match=r"layers\.l\.experts\.0\.weights: .*wrong"):
        build(data)


def test_weights_that_differ_from_their_manifest_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    (layer,) = build(config([FEED_FORWARD], policy={"kind": "switch"}))
    save_weights(path, initial_module(layer.experts[0].spec).state_dict())
    write_manifest(tmp_path)
    data = config([{**FEED_FORWARD, "weights": str(path)}], policy={"kind": "switch"})
    assert build(data)[0].experts[0].spec.weights == str(path)
    save_weights(path, {"other": torch.ones(3)})
    with pytest.raises(WeightsError, match="sha256"):
        build(data)


def test_a_plug_in_that_is_missing_is_named():
    with pytest.raises(PlugInError, match=r"plug_ins\.0: .*moe-runtime-nowhere"):
        build({**config([FEED_FORWARD], policy={"kind": "switch"}), "plug_ins": ["moe-runtime-nowhere"]})


def test_a_gpu_for_an_expert_of_a_cpu_runtime_is_a_contradiction():
    data = {**config([{**FEED_FORWARD, "resources": {"num_gpus": 1}}], policy={"kind": "switch"}), "device": "cpu"}
    assert mistakes(data) == ["layers.l.experts.0.resources.num_gpus: expected 0 or nothing with device cpu, found 1"]


def test_validate_tells_what_would_be_served():
    summary = validate({**config([{**FEED_FORWARD, "count": 3}], experts_per_actor=2), "name": "mine"})
    (layer,) = summary.layers
    assert (summary.name, summary.num_routers, summary.address) == ("mine", 1, "127.0.0.1:50051")
    assert layer.experts == {f"feed_forward-{i}": "feed_forward" for i in range(3)}
    assert (layer.item_shape, layer.out_shape, layer.policy, layer.num_actors) == ((6,), (4,), "top_k", 2)


def test_a_recipe_is_the_same_layer_after_pickling():
    (recipe,) = build(config([{**FEED_FORWARD, "count": 3}]))
    layer = build_routed_layer(pickle.loads(pickle.dumps(recipe)))
    assert (layer.name, layer.num_experts, layer.gate_features) == ("l", 3, 6)
    tokens = torch.ones(2, 6)
    torch.testing.assert_close(layer.gate(tokens), build_routed_layer(recipe).gate(tokens), rtol=0, atol=0)


def test_a_layer_knows_what_to_do_when_experts_fail_or_are_slow():
    (recipe,) = build(
        config(
            [{**FEED_FORWARD, "count": 3, "replicas": 2}],
            on_failure={"order": ["replica", "error"]},
            hedge={"times": 3.0},
        )
    )
    layer = build_routed_layer(recipe)
    assert layer.on_failure.order == ("replica", "error")
    assert layer.hedge is not None
    assert layer.hedge.times == 3.0
    assert not layer.can_reroute


def test_validate_names_the_files_that_only_the_nodes_of_the_routers_have(tmp_path):
    tls = {"cert": str(tmp_path / "router.pem"), "key": str(tmp_path / "router.key")}
    summary = validate({**config([{**FEED_FORWARD, "count": 2}]), "security": {"tls": tls}})
    assert summary.unchecked_files == {"security.tls.cert": tls["cert"], "security.tls.key": tls["key"]}
    assert validate(config([{**FEED_FORWARD, "count": 2}])).unchecked_files == {}


def test_a_gate_takes_its_weights_from_a_file_whose_keys_are_its_parameters(tmp_path):
    path = tmp_path / "gate.safetensors"
    save_weights(path, {"weight": torch.arange(12.0).reshape(2, 6)})
    (recipe,) = build(config([{**FEED_FORWARD, "count": 2}], gate={"kind": "linear", "weights": str(path)}))
    gate = build_routed_layer(recipe).gate
    assert not gate.training
    assert gate(torch.ones(1, 6)).tolist() == [[15.0, 51.0]]


def test_layers_of_equal_shape_start_with_different_gates():
    layer = config([{**FEED_FORWARD, "count": 2}])["layers"]["l"]
    one, two = build({"layers": {"one": layer, "two": layer}})
    gates = [load_gate(recipe.gate, GateShape(6, 2), weights=None, seed=recipe.gate_seed) for recipe in (one, two)]
    assert not torch.equal(gates[0](torch.ones(1, 6)), gates[1](torch.ones(1, 6)))


def test_a_gate_beyond_all_memory_is_checked_without_it():
    gate = {"kind": "mlp", "in_features": 6, "hidden_features": 2**28}
    assert [layer.name for layer in validate(config([FEED_FORWARD, FEED_FORWARD], gate=gate)).layers] == ["l"]


def test_a_gate_file_is_compared_with_a_gate_that_is_not_allocated(tmp_path):
    path = tmp_path / "gate.safetensors"
    save_weights(path, {"weight": torch.zeros(2, 3)})
    gate = {"kind": "linear", "in_features": 2**27, "weights": str(path)}
    assert mistakes(config([FEED_FORWARD, FEED_FORWARD], gate=gate)) == [
        "layers.l.gate.weights: weight: expected shape [2, 134217728], found [2, 3]"
    ]


def test_what_torch_says_of_an_impossible_option_follows_the_key():
    experts = [{"kind": "feed_forward", "options": {"hidden_features": 99999999999999999999}}] * 2
    lines = mistakes(config(experts))
    assert len(lines) == 2
    assert all(line.startswith(f"layers.l.experts.{i}: building kind ") for i, line in enumerate(lines))
