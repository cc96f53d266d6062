"""Building: seeds, weights, devices' independence of global state, and the trial run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moe_runtime.config.experts import ViewConfig
from moe_runtime.errors import ConfigError, PlugInError, WeightsError
from moe_runtime.experts.build import build_expert, check_weights
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.weights import check_fit, save_weights, write_manifest

if TYPE_CHECKING:
    from conftest import InstallPlugIn

PLUG_IN = """
    import torch
    from moe_runtime.config.strict import StrictModel
    from moe_runtime.experts import ExpertContract, ExpertKind
    from torch import nn

    class Options(StrictModel):
        pass

    class Module(nn.Module):
        def __init__(self, in_shape, options):
            super().__init__()
            self.calls = 0
            self.contract = ExpertContract(in_shape, in_shape)

        def forward(self, rows):
            BODY

    KIND = ExpertKind("NAME", Options, Module)
"""


def make_spec(**fields: Any) -> ExpertSpec:
    defaults: dict[str, Any] = {"layer": "toy", "expert_id": 0, "name": "toy-0", "kind": "feed_forward"}
    return ExpertSpec(**{**defaults, "item_shape": (4,), **fields})


def first_weight(spec: ExpertSpec) -> torch.Tensor:
    return next(build_expert(spec).module.parameters()).detach()


def test_same_spec_gives_the_same_parameters_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = first_weight(make_spec())
    torch.manual_seed(2)
    assert torch.equal(first_weight(make_spec()), first)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_expert(make_spec())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "toy-1"}, {"layer": "other"}])
def test_seed_name_and_layer_each_give_other_parameters(other: dict[str, Any]) -> None:
    assert not torch.equal(first_weight(make_spec()), first_weight(make_spec(**other)))


def test_place_in_the_layer_does_not_change_the_parameters() -> None:
    assert torch.equal(first_weight(make_spec()), first_weight(make_spec(expert_id=7)))


def test_built_expert_is_in_eval_mode_and_the_layers_dtype() -> None:
    expert = build_expert(make_spec(dtype="bfloat16", seed=5))
    assert not expert.module.training
    assert {parameter.dtype for parameter in expert.module.parameters()} == {torch.bfloat16}
    assert (expert.weights_version, expert.contract.out_shape) == ("seed:5", (4,))


def test_saved_weights_come_back_and_name_the_version(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    trained = build_expert(make_spec(seed=9)).module
    sha256 = save_weights(path, trained.state_dict())
    write_manifest(tmp_path)
    spec = make_spec(weights=str(path))
    assert torch.equal(first_weight(spec), next(trained.parameters()))
    assert build_expert(spec).weights_version == check_weights(spec) == sha256


def test_version_of_an_expert_without_a_file_is_its_seed() -> None:
    assert check_weights(make_spec(seed=5)) == "seed:5"


@pytest.mark.parametrize("build", [build_expert, check_weights])
def test_weights_that_do_not_fit_are_told_with_place_file_and_tensor(tmp_path: Path, build: Any) -> None:
    path = tmp_path / "toy.safetensors"
    save_weights(path, {"up.weight": torch.zeros(3, 4)})
    with pytest.raises(WeightsError) as caught:
        build(make_spec(weights=str(path), options={"bias": False}))
    assert str(caught.value).splitlines() == [
        f"layers.toy.experts[toy-0].weights: {path}: expected the tensor 'down.weight', found none",
        f"layers.toy.experts[toy-0].weights: {path}: up.weight: expected shape [128, 4], found [3, 4]",
    ]


@pytest.mark.parametrize("build", [build_expert, check_weights])
def test_missing_weights_are_told_with_place_and_file(tmp_path: Path, build: Any) -> None:
    path = tmp_path / "absent.safetensors"
    with pytest.raises(WeightsError) as caught:
        build(make_spec(weights=str(path)))
    assert str(caught.value) == f"layers.toy.experts[toy-0].weights: {path}: expected a weight file, found none"


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_weights(path, build_expert(make_spec(dtype="float64")).module.state_dict())
    with pytest.raises(WeightsError, match=r"up\.weight: expected dtype torch\.float32, found torch\.float64"):
        build_expert(make_spec(weights=str(path)))


def test_wrong_options_are_refused_before_the_weights_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such option"):
        check_weights(make_spec(options={"depth": 3}, weights=str(tmp_path / "absent")))


def test_view_is_resolved_once_for_the_host() -> None:
    expert = build_expert(make_spec(kind="recurrent", view=ViewConfig(shape=[2, 2])))
    assert expert.view.apply(torch.zeros(3, 4)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("shrinking", "return rows[:1]", r"expected output of shape \[2, 4\], found \[1, 4\]"),
        ("widening", "return rows.double()", r"expected output of dtype torch\.float32, found torch\.float64"),
        ("tupling", "return rows, rows", "expected a tensor as output, found tuple"),
        ("scribbling", "return rows.mul_(2)", "to leave its input as it was, found it changed"),
        ("counting", "self.calls += 1; return rows + self.calls", "same rows to give the same outputs in eval mode"),
        ("dropping", "return nn.functional.dropout(rows, 0.5)", "same rows to give the same outputs in eval mode"),
    ],
)
def test_trial_run_refuses_a_plug_in_that_breaks_its_contract(
    install_plug_in: InstallPlugIn, name: str, body: str, message: str
) -> None:
    install_plug_in(f"{name}_plug", {name: "KIND"}, source=PLUG_IN.replace("BODY", body).replace("NAME", name))
    # The dropped elements of the two trials could be the same by chance.
    torch.manual_seed(0)
    with pytest.raises(PlugInError, match=message) as caught:
        build_expert(make_spec(kind=name))
    assert str(caught.value).startswith("layers.toy.experts[toy-0]: a trial run of kind")


def test_trial_run_tells_what_a_forward_raised(install_plug_in: InstallPlugIn) -> None:
    source = PLUG_IN.replace("BODY", "return rows @ torch.zeros(9, 9)").replace("NAME", "clashing")
    install_plug_in("clashing_plug", {"clashing": "KIND"}, source=source)
    with pytest.raises(PlugInError, match="a trial run of kind 'clashing' in float32 on cpu raised RuntimeError: mat1"):
        build_expert(make_spec(kind="clashing"))


def test_trial_run_refuses_a_plug_in_that_ends_the_process(install_plug_in: InstallPlugIn) -> None:
    source = PLUG_IN.replace("BODY", "raise SystemExit('bye')").replace("NAME", "ending")
    install_plug_in("ending_plug", {"ending": "KIND"}, source=source)
    with pytest.raises(PlugInError, match="a trial run of kind 'ending' in float32 on cpu raised SystemExit: bye"):
        build_expert(make_spec(kind="ending"))


@pytest.mark.parametrize("build", [build_expert, check_weights])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, build: Any, value: float) -> None:
    path = tmp_path / "toy.safetensors"
    tensors = build_expert(make_spec()).module.state_dict()
    tensors["up.bias"][3] = value
    save_weights(path, tensors)
    with pytest.raises(WeightsError) as caught:
        build(make_spec(weights=str(path)))
    assert str(caught.value) == f"layers.toy.experts[toy-0].weights: {path}: up.bias: holds NaN or infinities"


def test_a_buffer_may_be_a_mask_of_minus_infinity_but_hold_no_nan() -> None:
    module = torch.nn.Module()
    module.register_buffer("mask", torch.zeros(2))
    check_fit(module, {"mask": torch.tensor([0.0, float("-inf")])})
    with pytest.raises(WeightsError, match="mask: holds NaN or infinities"):
        check_fit(module, {"mask": torch.tensor([0.0, float("nan")])})


@pytest.mark.parametrize("build", [build_expert, check_weights])
def test_a_path_that_no_file_can_have_is_told(build: Any) -> None:
    with pytest.raises(WeightsError, match="expected a readable weight file, found: embedded null byte"):
        build(make_spec(weights="/a\0b"))
