"""Golden probes: made of a trained module, kept in its weight file, compared when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_runtime.errors import ExpertError, WeightsError
from moe_runtime.experts.build import build_expert, check_weights, initial_module
from moe_runtime.experts.golden_probe import GoldenProbe, golden_probe
from moe_runtime.experts.protocol import ExpertContract
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.weights import load_weights, save_weights, write_manifest

CONTRACT = ExpertContract((2,), (2,))


def spec_of(**fields: Any) -> ExpertSpec:
    defaults: dict[str, Any] = {"layer": "toy", "expert_id": 0, "name": "toy-0", "kind": "feed_forward"}
    return ExpertSpec(**{**defaults, "item_shape": (4,), **fields})


def save_with_probe(path: Path, **fields: Any) -> nn.Module:
    """Write an expert's weights and probe; the expert."""
    spec = spec_of(**fields)
    module = initial_module(spec)
    save_weights(path, module.state_dict(), probe=golden_probe(module, module.contract, dtype=spec.torch_dtype))
    return module


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.factor


def test_the_same_seed_gives_the_same_probe_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = golden_probe(Times(3.0), CONTRACT, seed=5)
    torch.manual_seed(2)
    second = golden_probe(Times(3.0), CONTRACT, seed=5)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.outputs, first.rows * 3)
    assert not torch.equal(first.rows, golden_probe(Times(3.0), CONTRACT, seed=6).rows)


@pytest.mark.parametrize(
    ("dtype", "fine", "wrong"),
    [
        (torch.float64, 1 + 1e-8, 1 + 1e-5),
        (torch.float32, 1 + 1e-5, 1 + 1e-2),
        (torch.float16, 1 + 1e-2, 1.1),
        (torch.bfloat16, 1 + 2e-2, 1.2),
    ],
)
def test_what_another_device_may_round_passes_and_other_weights_do_not(
    dtype: torch.dtype, fine: float, wrong: float
) -> None:
    probe = golden_probe(Times(1.0), CONTRACT, dtype=dtype)
    assert probe.mistake(Times(fine)) is None
    mistake = probe.mistake(Times(wrong))
    assert mistake is not None
    assert "its golden probe differs by" in mistake


def test_infinities_and_nan_where_they_are_expected_are_no_difference() -> None:
    inf, nan = float("inf"), float("nan")
    probe = GoldenProbe(torch.ones(1, 3), torch.tensor([[inf, nan, 1.0]]))

    class Constant(nn.Module):
        def __init__(self, *values: float) -> None:
            super().__init__()
            self.values = torch.tensor([values])

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.values

    assert probe.mistake(Constant(inf, nan, 1.0)) is None
    for values in ((-inf, nan, 1.0), (inf, 1.0, 1.0), (inf, nan, nan), (1.0, nan, 1.0)):
        assert probe.mistake(Constant(*values)) is not None


def test_a_probe_is_made_in_eval_mode_and_leaves_every_part_in_its_own() -> None:
    module = nn.Sequential(nn.Dropout(0.9), nn.Dropout(0.9))
    module[1].eval()
    probe = golden_probe(module, CONTRACT)
    assert torch.equal(probe.outputs, probe.rows)
    assert [part.training for part in module.modules()] == [True, True, False]


def test_a_module_that_gives_nan_gets_no_probe() -> None:
    with pytest.raises(ExpertError, match="a golden probe of Times: expected finite outputs"):
        golden_probe(Times(float("nan")), CONTRACT)


def test_a_module_that_breaks_its_contract_gets_no_probe() -> None:
    with pytest.raises(ExpertError, match=r"expected output of shape \[4, 3\], found \[4, 2\]"):
        golden_probe(Times(1.0), ExpertContract((2,), (3,)))


def test_a_probe_is_kept_in_the_weight_file_beside_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    module = save_with_probe(path)
    weights = load_weights(path)
    assert weights.tensors.keys() == module.state_dict().keys()
    assert weights.probe is not None
    assert weights.probe.mistake(module) is None
    assert {"golden_probe.input", "golden_probe.output"} < load_file(path).keys()


def test_the_manifest_s_hash_covers_the_probe(tmp_path: Path) -> None:
    save_with_probe(tmp_path / "e.safetensors")
    write_manifest(tmp_path)
    listed = json.loads((tmp_path / "manifest.json").read_text())["files"]["e.safetensors"]["sha256"]
    assert build_expert(spec_of(weights=str(tmp_path / "e.safetensors"))).weights_version == listed


def test_a_file_without_a_probe_loads_as_ever_and_gets_one_when_it_is_tried(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_weights(path, initial_module(spec_of()).state_dict())
    expert = build_expert(spec_of(weights=str(path)))
    assert load_weights(path).probe is None
    assert expert.probe is not None
    assert expert.probe.mistake(expert.module) is None
    for parameter in expert.module.parameters():
        parameter.data.fill_(0.5)
    assert expert.probe.mistake(expert.module) is not None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_an_expert_passes_the_probe_that_was_stored_with_it(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "e.safetensors"
    save_with_probe(path, dtype=dtype)
    assert check_weights(spec_of(dtype=dtype, weights=str(path)))
    expert = build_expert(spec_of(dtype=dtype, weights=str(path)))
    assert expert.probe is not None
    assert expert.probe.rows.shape == (4, 4)


def test_weights_that_do_not_give_the_probe_s_output_are_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    module = initial_module(spec_of())
    probe = golden_probe(module, module.contract)
    other = initial_module(spec_of(seed=1))
    save_weights(path, other.state_dict(), probe=probe)
    with pytest.raises(WeightsError) as caught:
        build_expert(spec_of(weights=str(path)))
    with torch.inference_mode():
        largest = float((other(probe.rows) - probe.outputs).abs().max())
    assert f"layers.toy.experts[toy-0].weights: {path}: its golden probe differs by {largest:.3g}, expected" in str(
        caught.value
    )


def test_a_probe_of_another_shape_or_dtype_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    spec = spec_of(weights=str(path))
    state = initial_module(spec_of()).state_dict()
    for rows, outputs, message in (
        (torch.ones(1, 3), torch.ones(1, 4), r"golden_probe.input: expected rows of shape \[4\]"),
        (torch.ones(1, 4).double(), torch.ones(1, 4), "golden_probe.input: .* of torch.float64"),
        (torch.ones(0, 4), torch.ones(0, 4), "golden_probe.input: expected rows"),
        (torch.ones(2, 4), torch.ones(1, 4), r"golden_probe.output: expected output of shape \[2, 4\]"),
    ):
        save_weights(path, state, probe=GoldenProbe(rows, outputs))
        for use in (build_expert, check_weights):
            with pytest.raises(WeightsError, match=message):
                use(spec)


def test_half_a_probe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"golden_probe.input": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"e\.safetensors: expected .* or neither, found 'golden_probe.input' alone"):
        load_weights(path)


def test_a_module_s_tensor_cannot_have_the_name_of_a_probe(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected no tensor of the name 'golden_probe\.input'"):
        save_weights(tmp_path / "e.safetensors", {"golden_probe.input": torch.ones(1)})
