from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from moe_runtime.config.experts import ExpertConfig, ResourcesConfig
from moe_runtime.config.gates import LinearGateConfig, MLPGateConfig
from moe_runtime.config.load import load_config
from moe_runtime.config.models import CapacityConfig, LayerConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.config.runtime import LimitsConfig, RouterConfig, RuntimeConfig
from moe_runtime.errors import ConfigError

ISSUE_EXAMPLE = """
name: digits-demo
device: auto
plug_ins: [moe-runtime-example-expert]
layers:
  digits:
    item_shape: [64]
    gate: {kind: linear, weights: gate.safetensors}
    policy: {kind: top_k, k: 2, normalize: before_drop}
    capacity: {factor: 1.25, min: 4, drop: position, overflow: drop}
    residual: none
    timeout_ms: 2000
    experts:
      - {kind: conv, name: conv-0, weights: conv-0.safetensors, view: {shape: [1, 8, 8]},
         options: {channels: 16, out_features: 10}, resources: {num_cpus: 0.1, num_gpus: 0}}
      - {kind: feed_forward, count: 1, options: {hidden_features: 128, out_features: 10}}
router: {replicas: 1, max_batch_tokens: 4096, max_wait_ms: 2.0, max_queued_tokens: 65536, address: "127.0.0.1:50051"}
"""


def layer(**changes: Any) -> dict[str, Any]:
    return {"item_shape": [4], "experts": [{"kind": "identity", "count": 2}], **changes}


def runtime(**changes: Any) -> dict[str, Any]:
    return {"layers": {"digits": layer()}, **changes}


def mistakes(config: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    return str(caught.value).split("\n")


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_its_configuration_and_its_folder(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, ISSUE_EXAMPLE))

    assert loaded.base_dir == tmp_path
    assert loaded.resolve("gate.safetensors") == tmp_path / "gate.safetensors"
    assert loaded.resolve("/elsewhere/gate.safetensors") == Path("/elsewhere/gate.safetensors")
    digits = loaded.config.layers["digits"]
    assert digits.capacity.factor == 1.25
    assert digits.experts[0].view is not None
    assert digits.experts[0].view.shape == [1, 8, 8]
    assert loaded.config.router.address == "127.0.0.1:50051"


def test_a_path_may_be_text_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ISSUE_EXAMPLE)
    monkeypatch.chdir(tmp_path)
    assert load_config("config.yaml").base_dir == tmp_path


def test_a_mapping_starts_its_paths_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(runtime()).base_dir == tmp_path


def test_a_finished_configuration_is_taken_as_it_is() -> None:
    config = RuntimeConfig.model_validate(runtime())
    assert load_config(config).config is config


def test_a_misspelt_key_is_answered_with_the_nearest_one() -> None:
    config = runtime(layers={"digits": layer(experts=[{"kind": "identity", "optoins": {}, "count": 2}])})
    assert mistakes(config) == ["layers.digits.experts.0.optoins: unknown key; did you mean options?"]


def test_an_unknown_key_without_a_neighbour_is_answered_with_all_known_ones() -> None:
    assert mistakes(runtime(data_plane={"zzz": 1})) == [
        "data_plane.zzz: unknown key; known are port_range, encryption, network"
    ]


def test_a_key_of_one_kind_of_policy_is_known_by_that_kind_alone() -> None:
    config = runtime(layers={"digits": layer(policy={"kind": "switch", "k": 1})})
    assert mistakes(config) == ["layers.digits.policy.k: unknown key; known are kind"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"name": "a b"},
            "name: expected a name: a letter or digit, then at most 62 letters, digits and _ . -, found 'a b'",
        ),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, found 'tpu'"),
        ({"threads": "many"}, "threads: expected auto or a whole number, found 'many'"),
        ({"threads": 0}, "threads: expected auto or 1 to 1024, found 0"),
        ({"seed": -1}, "seed: expected at least 0, found -1"),
        ({"seed": 1.5}, "seed: expected a whole number, found 1.5"),
        ({"start_timeout_s": 0}, "start_timeout_s: expected more than 0.0, found 0"),
        ({"start_timeout_s": float("nan")}, "start_timeout_s: expected a finite number, found nan"),
        ({"start_timeout_s": float("inf")}, "start_timeout_s: expected a finite number, found inf"),
        ({"start_timeout_s": "soon"}, "start_timeout_s: expected a number, found 'soon'"),
        ({"plug_ins": "one"}, "plug_ins: expected a list, found 'one'"),
        ({"plug_ins": [3]}, "plug_ins.0: expected a text, found 3"),
        ({"layers": {}}, "layers: expected 1 or more entries with router.replicas 1, found an empty mapping"),
        ({"layers": [1]}, "layers: expected a mapping, found [1]"),
        ({"layers": None}, "layers: expected a mapping, found nothing (null)"),
        ({"router": "here"}, "router: expected a mapping, found 'here'"),
        (
            {"router": {"address": "50051"}},
            "router.address: expected HOST:PORT with a port of 0 to 65535, found '50051'",
        ),
        (
            {"router": {"address": "h:70000"}},
            "router.address: expected HOST:PORT with a port of 0 to 65535, found 'h:70000'",
        ),
        (
            {"data_plane": {"port_range": [1, 2, 3]}},
            "data_plane.port_range: expected at most 2 entries, found [1, 2, 3]",
        ),
        (
            {"data_plane": {"port_range": [9, 8]}},
            "data_plane.port_range: expected [first, last] with 1 <= first <= last <= 65535, found [9, 8]",
        ),
        (
            {"limits": {"default_timeout_s": 9, "max_timeout_s": 5}},
            "limits.default_timeout_s: expected at most 5.0, the max_timeout_s, found 9.0",
        ),
        ({3: 4}, "3: expected a text as key, found 3"),
    ],
)
def test_a_mistake_is_one_line_with_path_expectation_and_finding(change: dict[Any, Any], line: str) -> None:
    assert mistakes(runtime() | change) == [line]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"item_shape": [0]}, "item_shape: expected sizes of at least 1, found [0]"),
        ({"dtype": "int8"}, "dtype: expected float32, float64, float16 or bfloat16, found 'int8'"),
        ({"allow_non_finite": "perhaps"}, "allow_non_finite: expected true or false, found 'perhaps'"),
        ({"gate": {"kind": "lineal"}}, "gate.kind: expected one of linear, mlp, noisy, cosine, multi, found 'lineal'"),
        ({"losses": {"load": 0.1}}, "losses.load: expected 0 without a noisy gate, found 0.1"),
        (
            {"losses": {"mutual_information": 1}},
            "losses.mutual_information: expected 0 without a gate per task, found 1",
        ),
        (
            {"policy": {"kind": "hash"}, "losses": {"z": 0.1}},
            "losses.z: expected 0 without a policy that asks the gate, found 0.1",
        ),
        (
            {"policy": {"kind": "hash"}, "gate": {"kind": "multi", "tasks": ["a"]}},
            "gate.kind: expected linear, found multi: policy hash asks no gate",
        ),
        (
            {"balance": {"online_bias": True}},
            "balance.online_bias: expected policy top_k with expert_bias true, found expert_bias false",
        ),
        (
            {"balance": {"online_bias": True}, "policy": {"kind": "switch"}},
            "balance.online_bias: expected policy top_k with expert_bias true, found policy switch",
        ),
        ({"gate": {"kind": "mlp"}}, "gate.hidden_features: missing; expected width of the hidden layer"),
        ({"gate": {"kind": "linear", "jitter_eps": 1}}, "gate.jitter_eps: expected less than 1.0, found 1"),
        (
            {"policy": {"kind": "topk"}},
            "policy.kind: expected one of dense, top_k, switch, gshard_top2, sparsemixer, hierarchical, expert_choice, "
            "global_assignment, sinkhorn, hash, random, round_robin, reinforce, caller, found 'topk'",
        ),
        ({"policy": 3}, "policy: expected a mapping, found 3"),
        ({"policy": {"kind": "top_k", "k": 3}}, "policy.k: expected at most 2, the layer's experts, found 3"),
        (
            {"experts": [{"name": "a"}]},
            "experts.0.kind: missing; expected a built-in kind or one that a plug-in registers",
        ),
        (
            {"experts": [{"kind": "a", "count": 2, "weights": "w"}]},
            "experts.0.weights: with count 2, expected a name with {i}, found 'w'",
        ),
        (
            {"experts": [{"kind": "a", "count": 2, "view": {"columns": [4, 2]}}]},
            "experts.0.view.columns: expected [start, stop] with 0 <= start < stop, found [4, 2]",
        ),
        ({"experts": [{"kind": "a", "count": 70000}]}, "experts.0.count: expected at most 65536, found 70000"),
    ],
)
def test_a_mistake_in_a_layer_names_the_layer(change: dict[str, Any], line: str) -> None:
    assert mistakes(runtime(layers={"digits": layer(**change)})) == [f"layers.digits.{line}"]


def test_a_default_policy_counts_its_experts_too() -> None:
    config = runtime(layers={"digits": layer(experts=[{"kind": "identity"}])})
    assert mistakes(config) == ["layers.digits.policy.k: expected at most 1, the layer's experts, found 2"]


def test_a_layer_with_a_bad_name_is_named_once() -> None:
    [line] = mistakes(runtime(layers={"bad name": layer()}))
    assert line.startswith("layers.bad name: expected a name: ")


def test_every_mistake_is_its_own_line_after_the_file_name(tmp_path: Path) -> None:
    path = write(tmp_path, "nam: x\nlayers: {digits: {item_shape: 8, experts: [{kind: a}, {knd: b}]}}\n")
    assert mistakes(path) == [
        "config.yaml: layers.digits.item_shape: expected a list, found 8",
        "config.yaml: layers.digits.experts.1.kind: missing; expected a built-in kind or one that a plug-in registers",
        "config.yaml: layers.digits.experts.1.knd: unknown key; did you mean kind?",
        "config.yaml: nam: unknown key; did you mean name?",
    ]


def test_a_long_value_is_shortened() -> None:
    [line] = mistakes(runtime(device="x" * 1000))
    assert line.endswith("x...")
    assert len(line) < 150


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nseed: 1\nname: b\n")
    assert mistakes(path) == ["config.yaml: line 3, column 1: key 'name' is already in line 1; write it once"]


def test_a_key_written_twice_deep_inside_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "layers:\n  digits: {item_shape: [1],\n    item_shape: [2]}\n")
    assert mistakes(path) == ["config.yaml: line 3, column 5: key 'item_shape' is already in line 2; write it once"]


def test_a_merge_key_may_be_overridden(tmp_path: Path) -> None:
    text = """
layers:
  one: &base {item_shape: [4], experts: [{kind: identity, count: 2}]}
  two: {<<: *base, item_shape: [8]}
"""
    assert load_config(write(tmp_path, text)).config.layers["two"].item_shape == [8]


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    [line] = mistakes(write(tmp_path, "name: a\nlayers: {digits: [1, 2}\n"))
    assert line.startswith("config.yaml: line 2, column 23: expected ',' or ']', but got '}'")


def test_a_control_character_is_a_mistake_and_no_traceback(tmp_path: Path) -> None:
    [line] = mistakes(write(tmp_path, "name: \x00\n"))
    assert line.startswith("config.yaml: unacceptable character")


def test_a_python_tag_is_refused(tmp_path: Path) -> None:
    [line] = mistakes(write(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))
    assert "could not determine a constructor" in line


def test_a_sequence_as_key_is_a_mistake_and_no_traceback(tmp_path: Path) -> None:
    [line] = mistakes(write(tmp_path, "name: a\n? [1, 2]\n: b\n"))
    assert "line 2" in line


@pytest.mark.parametrize(("text", "found"), [("", "nothing (null)"), ("- a\n", "['a']"), ("plain", "'plain'")])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, text)
    assert mistakes(path) == [f"config.yaml: expected a mapping with the key layers, found {found}"]


def test_an_absent_file_is_named_with_its_whole_path(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: there is no such file"]


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"name: \xff\n")
    assert mistakes(path) == ["config.yaml: expected UTF-8 text, found other bytes at offset 6"]


@pytest.mark.parametrize("source", [3, None, ["a"]])
def test_a_source_of_another_type_is_refused(source: Any) -> None:
    [line] = mistakes(source)
    assert line.startswith("configuration: expected a path or a mapping, found ")


HUGE = 10**30


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (runtime(threads=100_000_000), "threads: expected auto or 1 to 1024, found 100000000"),
        (runtime(threads=HUGE), f"threads: expected auto or 1 to 1024, found {HUGE}"),
        (runtime(seed=HUGE), f"seed: expected at most {2**63 - 1}, found {HUGE}"),
        (runtime(start_timeout_s=1e300), "start_timeout_s: expected at most 2592000.0, found 1e+300"),
        (
            runtime(layers={"a": layer(item_shape=[2**20, 2**20])}),
            "layers.a.item_shape: expected at most 268435456 elements, found [1048576, 1048576]",
        ),
        (
            runtime(layers={"a": layer(policy={"kind": "top_k", "norm_p": 0.01})}),
            "layers.a.policy.norm_p: expected at least 0.1, found 0.01",
        ),
        (
            runtime(layers={"a": layer(policy={"kind": "top_k", "scaling_factor": 1e7})}),
            "layers.a.policy.scaling_factor: expected at most 1000000.0, found 10000000.0",
        ),
        (
            runtime(layers={"a": layer(experts=[{"kind": "x", "resources": {"num_gpus": 1.5}}])}),
            "layers.a.experts.0.resources.num_gpus: expected a whole number above 1, as Ray shares only a single "
            "GPU; found 1.5",
        ),
    ],
)
def test_a_value_beyond_what_can_run_is_one_line(config: Any, line: str) -> None:
    assert mistakes(config)[0] == line


def integer_fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if field.annotation in (int, int | None):
            yield name


@pytest.mark.parametrize(
    "model", [LinearGateConfig, MLPGateConfig, TopKPolicyConfig, CapacityConfig, ResourcesConfig, ExpertConfig,
              LayerConfig, RouterConfig, LimitsConfig, RuntimeConfig],
)  # fmt: skip
def test_every_integer_has_an_upper_bound(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(dict.fromkeys(integer_fields(model), HUGE))
    refused = {error["loc"][0] for error in caught.value.errors() if error["type"] == "less_than_equal"}
    assert refused == set(integer_fields(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "config.yaml: expected a few levels of nesting, found too many to read"),
        ("seed: " + "9" * 5000, "config.yaml: a value cannot be read: "),
        ("name: 2024-13-45", "config.yaml: a value cannot be read: "),
        ("seed: 0x" + "f" * 5000, "config.yaml: seed: "),
    ],
)
def test_text_that_python_cannot_turn_into_values_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert any(line.startswith(message) for line in mistakes(path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"router": {"address": "127.0.0.1:5000", "replicas": 3}, "metrics": {"address": "127.0.0.1:5002"}},
            "metrics.address: expected other ports than router.address's 5000 to 5002 (replica i takes port + i), "
            "found 5002 to 5004",
        ),
        (
            {"router": {"address": "127.0.0.1:5000"}, "data_plane": {"port_range": [4000, 5000]}},
            "data_plane.port_range: expected other ports than router.address's 5000 to 5000 (replica i takes port "
            "+ i), found 4000 to 5000",
        ),
    ],
)
def test_ports_that_collide_are_refused(changes: dict[str, Any], line: str) -> None:
    assert mistakes(runtime(**changes)) == [line]


def test_ports_that_are_any_or_apart_are_fine() -> None:
    router = {"address": "127.0.0.1:0", "replicas": 3}
    load_config(runtime(router=router, metrics={"address": "127.0.0.1:0"}, data_plane={"port_range": [1, 9]}))
    load_config(runtime(router={"address": "127.0.0.1:5000"}, metrics={"address": "127.0.0.1:5001"}))


def test_a_layer_without_replicas_cannot_hedge() -> None:
    assert mistakes(runtime(layers={"digits": layer(hedge={})})) == [
        "layers.digits.hedge: expected an expert with replicas above 1, which it would ask too, found none"
    ]


def test_a_gate_and_a_policy_without_a_kind_are_of_the_default_kind() -> None:
    config = load_config(runtime(layers={"digits": layer(gate={"bias": True}, policy={"k": 1})})).config
    digits = config.layers["digits"]
    assert (digits.gate, digits.policy) == (LinearGateConfig(bias=True), TopKPolicyConfig(k=1))
