"""The kind ``transformers``: what a layer's configuration says of an expert, and what a host makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes import zoo
from fakes.changed_checkpoints import change_tensors
from moe_runtime.errors import ConfigError, UnsupportedModelError, WeightsError
from moe_runtime.experts.build import build_expert, check_weights
from moe_runtime.experts.checkpoints import requirement
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.experts.spec import ExpertSpec, build_module, expert_contract

MODULE = "model.layers.1.mlp.experts"
#: Of one expert: gate, up and down between 32 and 64.
NUM_WEIGHTS = 3 * 32 * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("mixtral", tmp_path_factory.mktemp("mixtral"))


def spec_of(
    folder: Path, *, width: int = 32, dtype: Any = "float32", weights: str | None = None, **options: Any
) -> ExpertSpec:
    given = {"checkpoint": str(folder), "module": MODULE, "expert": 2, **options}
    return ExpertSpec(MODULE, 2, "experts-2", "transformers", (width,), options=given, dtype=dtype, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_expert_of_a_layer_is_bit_equal_to_the_model_s_in_the_layer_s_dtype(folder: Path, dtype: torch.dtype) -> None:
    expert = build_expert(spec_of(folder, dtype=str(dtype).removeprefix("torch.")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm").eval()
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = model.get_submodule(MODULE)(rows, torch.full((5, 1), 2), torch.ones(5, 1, dtype=dtype))
        assert torch.equal(expert.module(rows), expected)
    assert not any(parameter.requires_grad for parameter in expert.module.parameters())
    assert not any(module.training for module in expert.module.modules())


def test_contract_names_the_width_and_the_cost_of_a_row(folder: Path) -> None:
    contract = expert_contract(spec_of(folder))
    assert (contract.in_shape, contract.out_shape, contract.cost_per_row) == ((32,), (32,), NUM_WEIGHTS)


def test_checks_before_a_start_neither_read_nor_allocate(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = checkpoint.bytes_read
    spec = spec_of(folder)
    expert_contract(spec)
    assert check_weights(spec) == checkpoint.version
    assert all(parameter.is_meta for parameter in build_module(spec).parameters())
    assert checkpoint.bytes_read == before


def test_loading_allocates_what_the_expert_takes_and_no_more(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.expert(MODULE, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        expert = checkpoint.expert(MODULE, 2)
    # What no operator asked for is the file, which is mapped.
    events = [event for event in profile.events() or () if event.name != "[memory]"]
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in events)
    assert allocated == 4 * NUM_WEIGHTS == sum(4 * parameter.numel() for parameter in expert.parameters())


def test_version_is_the_checkpoint_s_and_changes_with_its_files(tmp_path: Path) -> None:
    spec = spec_of(zoo.save("mixtral", tmp_path))
    before = check_weights(spec)
    assert build_expert(spec).weights_version == before
    change_tensors(tmp_path, lambda tensors: {**tensors, "extra": torch.zeros(1)})
    assert check_weights(spec) != before
    assert build_expert(spec).weights_version == check_weights(spec)


def test_expert_has_the_answer_of_its_trial_as_its_probe(folder: Path) -> None:
    expert = build_expert(spec_of(folder))
    assert expert.probe is not None
    assert expert.probe.mistake(expert.module) is None
    other = build_expert(spec_of(folder, expert=1))
    assert "differs" in str(expert.probe.mistake(other.module))


def test_expert_that_the_module_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers\.model.*one of the 4 experts of .*found 4"):
        expert_contract(spec_of(folder, expert=4))


def test_module_without_experts_is_refused_at_its_place_in_the_configuration(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.model\.layers\.1\.mlp\.experts\.experts\[experts-2\]"):
        expert_contract(spec_of(folder, module="model.layers.1"))


def test_rows_of_another_width_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected rows of shape \[32\].*found \[16\]"):
        expert_contract(spec_of(folder, width=16))


def test_weights_beside_the_checkpoint_are_refused(folder: Path) -> None:
    for use in (check_weights, build_expert):
        with pytest.raises(WeightsError, match="whose options name its weights"):
            use(spec_of(folder, weights="expert.safetensors"))


def test_broken_checkpoint_is_an_error_at_the_expert_s_place(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path)
    spec = spec_of(tmp_path)
    check_weights(spec)
    change_tensors(tmp_path, lambda tensors: dict(list(tensors.items())[:3]))
    with pytest.raises(WeightsError, match=rf"^{spec.where.split('[')[0]}"):
        build_expert(spec)


def test_folder_that_is_missing_is_an_error_at_the_expert_s_place(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"experts\[experts-2\].*no such folder"):
        expert_contract(spec_of(tmp_path / "nowhere"))


def test_kinds_are_known_without_importing_transformers() -> None:
    program = (
        "import sys; from moe_runtime.experts.registry import built_in_kinds\n"
        "assert 'transformers' in built_in_kinds(); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("found", ["4.57.1", "5.22.9", "5.24.0", "6.0.0"])
def test_other_series_of_transformers_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirement, "version", lambda _: found)
    with pytest.raises(ConfigError, match=rf"expected transformers 5\.23\.\*.*found {found}; `pip install"):
        requirement.check_transformers()


def test_missing_transformers_is_an_error_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise requirement.PackageNotFoundError(name)

    monkeypatch.setattr(requirement, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'moe-runtime\[transformers\]'"):
        requirement.check_transformers()
