"""Experts that are layers, before anything starts: what validates, what does not, and what hosts are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.configuration_page import current_page
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError, InnerLayerError
from moe_runtime.experts.build import build_expert, check_weights
from moe_runtime.experts.registry import known_kinds
from moe_runtime.launch.build import build_layers, validate
from moe_runtime.launch.nested.options import RemoteOptions
from moe_runtime.launch.packing import plan_hosts

FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 4, "out_features": 3}}


def moe(layer: str, **options: Any) -> dict[str, Any]:
    return {"kind": "moe", "options": {"layer": layer, **options}}


def remote(**options: Any) -> dict[str, Any]:
    return {"kind": "remote", "options": {"target": "127.0.0.1:50051", "layer": "l", **options}}


def layer(*experts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"item_shape": [6], "policy": {"kind": "dense"}, "experts": [*experts], **changes}


def config(**layers: dict[str, Any]) -> dict[str, Any]:
    return {"device": "cpu", "layers": layers}


def mistakes(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_layers(load_config(data))
    return str(caught.value).splitlines()


def test_a_layer_of_layers_takes_their_shape_and_each_knows_its_level() -> None:
    # The outermost first, and the innermost is an expert of both.
    data = config(a=layer(moe("b"), moe("c")), b=layer(moe("c"), FEED_FORWARD), c=layer(FEED_FORWARD))
    recipes = build_layers(load_config(data))
    assert [(recipe.name, recipe.out_shape, recipe.level) for recipe in recipes] == [
        ("a", (3,), 0),
        ("b", (3,), 1),
        ("c", (3,), 2),
    ]
    assert [expert.spec.options["out_shape"] for expert in recipes[0].experts] == [[3], [3]]
    assert validate(data).layers[0].experts == {"moe-0": "moe", "moe-1": "moe"}


def test_layers_that_contain_themselves_are_a_mistake_that_shows_the_way_round() -> None:
    data = config(a=layer(moe("b"), FEED_FORWARD), b=layer(moe("c")), c=layer(moe("a")), d=layer(moe("d")))
    assert mistakes(data) == [
        "layers.c.experts.0.options.layer: expected a layer that does not contain this one, "
        "found the cycle a -> b -> c -> a",
        "layers.d.experts.0.options.layer: expected a layer that does not contain this one, found the cycle d -> d",
    ]


def test_a_layer_that_is_not_there_is_told_with_its_nearest() -> None:
    (line,) = mistakes(config(outer=layer(moe("iner"), FEED_FORWARD), inner=layer(FEED_FORWARD)))
    assert line.startswith("layers.outer.experts.0.options.layer: expected a layer of this runtime, found 'iner'; ")
    assert "inner" in line


def test_a_mistake_in_an_inner_layer_is_told_once_and_where_it_is() -> None:
    broken = layer({"kind": "feed_forward", "options": {"hidden_featurs": 4}})
    (line,) = mistakes(config(outer=layer(moe("inner")), inner=broken))
    assert line.startswith("layers.inner.experts.0.options.hidden_featurs: ")


def test_shared_experts_may_be_layers_too() -> None:
    data = config(a=layer(FEED_FORWARD, shared_experts=[moe("b")]), b=layer(moe("a")))
    assert mistakes(data) == [
        "layers.b.experts.0.options.layer: expected a layer that does not contain this one, found the cycle a -> b -> a"
    ]


@pytest.mark.parametrize(
    ("expert", "inner", "expected"),
    [
        (
            moe("inner"),
            layer(FEED_FORWARD, item_shape=[5]),
            ".options.layer: rows of shape: expected [5], as layer inner has it, found [6]",
        ),
        (
            {**moe("inner"), "view": {"shape": [2, 3]}},
            layer(FEED_FORWARD),
            ".view.shape: expected [6], as layer inner has it, found [2, 3]",
        ),
        (
            moe("inner", out_shape=[4]),
            layer(FEED_FORWARD),
            ".options.out_shape: expected [3], as layer inner has it, found [4]",
        ),
        (
            moe("inner"),
            layer(FEED_FORWARD, dtype="float64"),
            ".options.layer: rows of dtype: expected float64, as layer inner has it, found float32",
        ),
        (
            moe("inner"),
            layer(FEED_FORWARD, gate={"kind": "linear", "in_features": 2}),
            ".options.layer: expected a layer whose gate needs nothing but the rows, "
            "found inner, whose gate sees a gate_input, 2 wide",
        ),
        (
            moe("inner"),
            layer(FEED_FORWARD, gate={"kind": "multi", "tasks": ["a", "b"]}),
            ".options.layer: expected a layer whose gate needs nothing but the rows, "
            "found inner, whose gate needs a task and has no default_task",
        ),
        (
            moe("inner", tls=True),
            layer(FEED_FORWARD),
            ".options: expected neither tls nor ca, since the routers serve as security.tls says, found tls or ca",
        ),
        (
            {**moe("inner"), "weights": "w.safetensors"},
            layer(FEED_FORWARD),
            ".weights: expected none for kind 'moe', whose rows another layer computes, found ",
        ),
    ],
)
def test_an_expert_that_cannot_be_the_layer_that_it_names_is_a_mistake(
    expert: dict[str, Any], inner: dict[str, Any], expected: str
) -> None:
    lines = mistakes(config(outer=layer(expert), inner=inner))
    assert [line.startswith(f"layers.outer.experts.0{expected}") for line in lines] == [True], lines


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "expert_choice"},
        {"kind": "global_assignment", "evaluation": "as_in_training"},
        {"kind": "sinkhorn", "evaluation": "as_in_training"},
    ],
    ids=lambda policy: policy["kind"],
)
def test_a_layer_whose_rows_change_each_other_s_answers_has_to_allow_it_to_be_an_expert(policy: dict[str, Any]) -> None:
    def data(**changes: Any) -> dict[str, Any]:
        inner = layer({**FEED_FORWARD, "count": 2}, policy=policy, **changes)
        return config(outer=layer(FEED_FORWARD, shared_experts=[moe("inner")]), inner=inner)

    assert mistakes(data()) == [
        "layers.outer.shared_experts.0.options.layer: expected a layer whose rows do not change each other's answers, "
        f"since rows of several requests share a call, found inner, whose policy {policy['kind']} couples those of a "
        "batch; layers.inner.allow_batch_coupled: true allows it"
    ]
    assert build_layers(load_config(data(allow_batch_coupled=True)))


def test_policies_that_couple_rows_in_training_alone_are_those_of_any_expert() -> None:
    greedy = {"kind": "sinkhorn", "evaluation": "greedy"}
    inner = layer({**FEED_FORWARD, "count": 2}, policy=greedy)
    assert build_layers(load_config(config(outer=layer(moe("inner")), inner=inner)))


def test_an_exact_layer_asks_exact_layers_alone() -> None:
    data = config(outer=layer(moe("inner"), exact=True), inner=layer(FEED_FORWARD))
    assert mistakes(data) == [
        "layers.outer.experts.0.options.layer: expected an exact layer in an exact one, found inner, which is not"
    ]
    assert build_layers(
        load_config(config(outer=layer(moe("inner"), exact=True), inner=layer(FEED_FORWARD, exact=True)))
    )


def test_a_runtime_with_tokens_and_certificates_wants_both_of_its_experts() -> None:
    data = config(outer=layer(moe("inner")), inner=layer(FEED_FORWARD))
    data["security"] = {"tls": {"cert": "c", "key": "k", "client_ca": "ca"}, "tokens": "tokens.yaml"}
    prefix = "layers.outer.experts.0.options: expected "
    assert mistakes(data) == [
        prefix + "token_env or token_file, since the routers want a token (security.tokens), found neither",
        prefix + "ca, or tls: true, since the routers serve as security.tls says, found neither",
        prefix + "cert and key, since the routers want a certificate (security.tls.client_ca), found neither",
    ]
    access = {"token_env": "T", "ca": "ca", "cert": "c", "key": "k"}
    data["layers"]["outer"] = layer(moe("inner", **access))
    assert build_layers(load_config(data))


def test_a_token_that_would_leave_the_machine_in_plain_text_has_to_be_allowed_to() -> None:
    data = config(outer=layer(moe("inner", token_env="T")), inner=layer(FEED_FORWARD))
    data |= {"router": {"address": "0.0.0.0:0"}, "security": {"tokens": "t.yaml", "insecure": True}}
    assert mistakes(data) == [
        "layers.outer.experts.0.options: expected insecure: true, since the token goes to the routers in plain text, "
        "found false"
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "here"}, ".target: expected HOST:PORT, found 'here'"),
        ({"target": []}, ".target: expected at least one HOST:PORT, found none"),
        ({"token_env": "A", "token_file": "b"}, ": expected token_env or token_file, found both"),
        ({"cert": "c"}, ": expected both cert and key, or neither, found one of them"),
        ({"server_name": "s"}, ": cert, key and server_name: expected them with TLS only, found neither tls nor ca"),
        (
            {"target": ["127.0.0.1:1", "router.example:50051"], "token_env": "A"},
            ": expected tls or ca, since the token would go to router.example:50051 in plain text",
        ),
        ({"token": "secret"}, ".token: kind 'remote' has no such option"),
    ],
)
def test_options_of_a_remote_layer_that_cannot_work_are_mistakes(options: dict[str, Any], expected: str) -> None:
    lines = mistakes(config(l=layer(remote(**options))))
    assert [line.startswith(f"layers.l.experts.0.options{expected}") for line in lines] == [True], lines


def test_a_remote_layer_is_checked_without_reaching_it() -> None:
    # Nobody listens at the address.
    data = config(l=layer(remote(target=["127.0.0.1:9", "127.0.0.1:10"], layer="far", out_shape=[2, 5])))
    (recipe,) = build_layers(load_config(data))
    assert recipe.out_shape == (2, 5)
    spec = recipe.experts[0].spec
    assert check_weights(spec) == "remote:127.0.0.1:9,127.0.0.1:10/far"
    expert = build_expert(spec)
    assert (expert.weights_version, expert.probe) == (check_weights(spec), None)
    assert [*expert.module.parameters()] == []


def test_hosts_of_layers_get_absolute_paths_and_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "layers: {l: {item_shape: [2], policy: {kind: dense}, experts: [{kind: remote, options: "
        '{target: "127.0.0.1:1", layer: far, ca: certs/ca.crt, token_file: ~/token}}, {kind: identity}]}}'
    )
    loaded = load_config(tmp_path / "c.yaml")
    far, own = plan_hosts(loaded.config, build_layers(loaded), gpus_available=True)
    options = far.experts[0].spec.options
    assert (options["ca"], options["token_file"]) == (str(tmp_path / "certs/ca.crt"), "~/token")
    assert (far.resources.num_gpus, far.device) == (0.0, "cpu")
    assert own.resources.num_gpus == 1.0


def test_a_token_is_read_where_the_options_say_and_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(**options: Any) -> str:
        return RemoteOptions(target="127.0.0.1:1", layer="l", **options).read_token()

    file = tmp_path / "token"
    file.write_text("of-the-file-0123456789\n")
    monkeypatch.setenv("INNER_TOKEN", "of-the-variable-012345")
    monkeypatch.setenv("SHORT_TOKEN", "hush")
    assert read() == ""
    assert read(token_file=str(file)) == "of-the-file-0123456789"
    assert read(token_env="INNER_TOKEN") == "of-the-variable-012345"
    with pytest.raises(InnerLayerError, match="in the variable SHORT_TOKEN, found none") as caught:
        read(token_env="SHORT_TOKEN")
    assert "hush" not in str(caught.value)
    with pytest.raises(InnerLayerError, match=r"expected a token in .*gone, found FileNotFoundError"):
        read(token_file=str(tmp_path / "gone"))


def test_both_kinds_are_known_and_documented() -> None:
    page = current_page()
    assert {"moe", "remote"} <= set(known_kinds())
    for line in ("### `remote`", "### `moe`", "| `target` | text or list of texts | required |"):
        assert line in page
