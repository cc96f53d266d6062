"""Specs: a cheap check that says where and what is wrong, before anything is allocated."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moe_runtime.config.experts import ViewConfig
from moe_runtime.errors import ConfigError, PlugInError
from moe_runtime.experts.protocol import ExpertContract
from moe_runtime.experts.spec import ExpertSpec, expert_contract

if TYPE_CHECKING:
    from conftest import InstallPlugIn

PLUG_IN = """
    from moe_runtime.config.strict import StrictModel
    from moe_runtime.experts import ExpertContract, ExpertKind
    from torch import nn

    class Options(StrictModel):
        pass

    class Module(nn.Linear):
        def __init__(self, in_shape, options):
            super().__init__(in_shape[-1], 2)
            BODY

    KIND = ExpertKind("NAME", Options, Module)
"""


def make_spec(kind: str = "feed_forward", **fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"layer": "toy", "expert_id": 3, "name": "toy-3", "kind": kind, "item_shape": (64,), **fields})


def test_contract_is_of_what_the_view_shows() -> None:
    spec = make_spec("conv", view=ViewConfig(shape=[1, 8, 8]), options={"out_features": 10})
    contract = expert_contract(spec)
    assert (contract.in_shape, contract.out_shape) == ((1, 8, 8), (10,))


def test_contract_of_an_expert_beyond_all_memory_costs_nothing() -> None:
    huge = make_spec(options={"hidden_features": 10**12})
    assert expert_contract(huge) == ExpertContract((64,), (64,), 2 * 64 * 10**12)


def test_contract_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    expert_contract(make_spec("transformer", view=ViewConfig(shape=[8, 8])))
    assert torch.equal(torch.get_rng_state(), before)


def test_spec_survives_pickling() -> None:
    spec = make_spec(view=ViewConfig(columns=(0, 8)), options={"out_features": 10}, dtype="bfloat16")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.torch_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            make_spec("fed_forward"),
            "experts[toy-3]: unknown kind 'fed_forward'; did you mean 'feed_forward'?",
        ),
        (
            make_spec(options={"hiden_features": 3}),
            "layers.toy.experts[toy-3].options.hiden_features: kind 'feed_forward' has no such option; "
            "did you mean 'hidden_features'? (known: activation, bias, hidden_features, out_features)",
        ),
        (
            make_spec("identity", options={"out_features": 3}),
            "options.out_features: kind 'identity' has no such option; there are none",
        ),
        (
            make_spec(options={"hidden_features": 0}),
            "layers.toy.experts[toy-3].options.hidden_features: expected at least 1, found 0",
        ),
        (
            make_spec(options={"activation": "tanh"}),
            "activation: expected relu or gelu, found 'tanh'",
        ),
        (
            make_spec(options={"out_features": 2**30}),
            "layers.toy.experts[toy-3]: expected output rows of at most 268435456 elements, found the shape",
        ),
        (make_spec("fourier"), "options.out_features: kind 'fourier' needs this option, found none"),
        (
            make_spec("transformer", view=ViewConfig(shape=[8, 8]), options={"num_heads": 5}),
            "options: num_heads: expected a divisor of hidden_size 32, found 5",
        ),
        (
            make_spec("conv", view=ViewConfig(shape=[1, 8, 8]), options={"pool": 2}),
            "options: pool: expected out_features beside it, or a pool of 1, found pool 2 alone",
        ),
        (make_spec(view=ViewConfig(shape=[9, 9])), "layers.toy.experts[toy-3]: view.shape: expected positive sizes"),
        (make_spec("conv"), "layers.toy.experts[toy-3]: kind 'conv': expected an input of shape (channels, height,"),
    ],
)
def test_mistake_is_told_with_its_place_and_what_was_expected(spec: ExpertSpec, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expert_contract(spec)
    assert message in str(caught.value)


def test_every_wrong_option_has_its_own_line() -> None:
    with pytest.raises(ConfigError) as caught:
        expert_contract(make_spec(options={"hidden_features": "many", "activation": "tanh", "depth": 2}))
    assert [line.split(": ")[0].rpartition(".")[2] for line in str(caught.value).splitlines()] == [
        "hidden_features",
        "activation",
        "depth",
    ]


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("bare_kind", "pass", "to have a `contract`, an ExpertContract; found a Module without one"),
        ("wrong_kind", "self.contract = 'two'", "to have a `contract`, an ExpertContract"),
        ("lying_kind", "self.contract = ExpertContract((5,), (2,))", "declare the input shape [64] .* found [5]"),
        ("peeking_kind", "self.weight.sum().item()", "building kind 'peeking_kind' for rows of shape [64] raised "),
    ],
)
def test_plug_in_whose_module_breaks_the_rules_is_named(
    install_plug_in: InstallPlugIn, name: str, body: str, message: str
) -> None:
    install_plug_in(f"{name}_plug", {name: "KIND"}, source=PLUG_IN.replace("BODY", body).replace("NAME", name))
    with pytest.raises(PlugInError, match=message.replace("[", r"\[")) as caught:
        expert_contract(make_spec(name))
    assert str(caught.value).startswith("layers.toy.experts[toy-3]: ")


def test_broken_plug_in_is_told_with_the_experts_place(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("absent_plug", {"absent_kind": "KIND"}, source="import no_such_module_anywhere")
    with pytest.raises(PlugInError, match=r"layers\.toy\.experts\[toy-3\]: kind 'absent_kind': .*ModuleNotFoundError"):
        expert_contract(make_spec("absent_kind"))


@pytest.mark.parametrize("size", [10**18, 99999999999999999999])
def test_options_beyond_what_torch_can_count_are_one_line(size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        expert_contract(make_spec(options={"hidden_features": size}))
    assert not isinstance(caught.value, PlugInError)
    [line] = str(caught.value).splitlines()
    assert line.startswith("layers.toy.experts[toy-3]: building kind 'feed_forward' for rows of shape [64] raised ")


def test_a_plug_in_that_ends_the_process_while_it_builds_is_named(install_plug_in: InstallPlugIn) -> None:
    source = PLUG_IN.replace("BODY", "raise SystemExit(3)").replace("NAME", "leaving_kind")
    install_plug_in("leaving_plug", {"leaving_kind": "KIND"}, source=source)
    with pytest.raises(PlugInError, match=r"building kind 'leaving_kind' .* raised SystemExit: 3"):
        expert_contract(make_spec("leaving_kind"))


def test_a_plug_in_that_ends_the_process_while_it_loads_is_named(install_plug_in: InstallPlugIn) -> None:
    install_plug_in("quitting_plug", {"quitting_kind": "KIND"}, source="raise SystemExit")
    with pytest.raises(PlugInError, match=r"raised SystemExit$"):
        expert_contract(make_spec("quitting_kind"))
