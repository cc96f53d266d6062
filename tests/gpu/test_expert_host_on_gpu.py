"""Experts on a CUDA device give the CPU's answers, whatever overlaps. Runs where there is one: ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_runtime.config.experts import ViewConfig
from moe_runtime.experts.build import LoadedExpert, build_expert, initial_module
from moe_runtime.experts.cuda_stage import CudaStage
from moe_runtime.experts.golden_probe import golden_probe
from moe_runtime.experts.host import ExpertCall, ExpertHost
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.weights import save_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = {
    "feed_forward": {"hidden_features": 32},
    "swiglu": {"hidden_features": 32},
    "identity": {},
    "zero": {},
}
DEVICE = torch.device("cuda", 0)


def spec_of(kind: str, dtype: str = "float32", *, width: int = 16) -> ExpertSpec:
    return ExpertSpec("layer", 0, "expert", kind, item_shape=(width,), options=SPECS[kind], dtype=dtype)


def on_gpu(spec: ExpertSpec) -> LoadedExpert:
    return build_expert(spec, device=DEVICE)


def random_rows(num_rows: int, *, seed: int = 0, width: int = 16) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def assert_agree(on_cpu: ExpertSpec, calls: list[Tensor], *, tolerance: float = 1e-4) -> None:
    """Check that calls for one expert, merged, have the same outcomes on the GPU as on the CPU."""
    outcomes = []
    for device in (torch.device("cpu"), DEVICE):
        host = ExpertHost({"a": build_expert(on_cpu, device=device)}, device=device)
        outcomes.append(host.run([ExpertCall("a", rows) for rows in calls]))
    for expected, found in zip(*outcomes, strict=True):
        assert (expected.error, found.error) == (None, None)
        assert expected.rows is not None
        assert found.rows is not None
        assert found.rows.is_cpu
        assert found.rows.is_contiguous()
        assert found.rows.dtype == expected.rows.dtype
        torch.testing.assert_close(found.rows.float(), expected.rows.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_host_on_the_gpu_agrees_with_one_on_the_cpu(kind: str, dtype: str) -> None:
    rows = random_rows(8).to(getattr(torch, dtype))
    assert_agree(spec_of(kind, dtype), [rows], tolerance=1e-4 if dtype == "float32" else 3e-2)


def test_merged_calls_and_one_without_rows_agree() -> None:
    assert_agree(spec_of("swiglu"), [random_rows(size, seed=size) for size in (3, 0, 5)])


def test_rows_in_the_wires_dtype_agree() -> None:
    spec = replace(spec_of("feed_forward"), wire_dtype="bfloat16")
    assert_agree(spec, [random_rows(7).bfloat16()], tolerance=3e-2)


def test_an_expert_that_sees_some_columns_agrees() -> None:
    spec = replace(spec_of("feed_forward"), view=ViewConfig(columns=(3, 11)))
    assert_agree(spec, [random_rows(5), random_rows(2, seed=1)])


def test_runs_that_overlap_do_not_touch_each_other() -> None:
    experts = {str(i): on_gpu(replace(spec_of("feed_forward", width=256), expert_id=i, name=str(i))) for i in range(4)}
    host = ExpertHost(experts, device=DEVICE)
    calls = [
        [ExpertCall(replica_id, random_rows(200 + run, seed=run, width=256)) for replica_id in experts]
        for run in range(8)
    ]
    expected = [host.run(each) for each in calls]
    under_way = [host.begin(each) for each in calls]
    found = [host.finish(run) for run in under_way]
    for alone, together in zip(expected, found, strict=True):
        for one, other in zip(alone, together, strict=True):
            assert (one.error, other.error) == (None, None)
            torch.testing.assert_close(one.rows, other.rows)


def test_answers_stay_as_they_are_while_later_runs_reuse_the_memory() -> None:
    host = ExpertHost({"a": on_gpu(spec_of("identity"))}, device=DEVICE)
    given = [random_rows(64, seed=seed) for seed in range(20)]
    answers = [host.run([ExpertCall("a", rows)])[0].rows for rows in given]
    for rows, answer in zip(given, answers, strict=True):
        assert answer is not None
        assert torch.equal(rows, answer)


def test_staging_buffers_are_reused() -> None:
    stage = CudaStage(DEVICE)
    host = ExpertHost({"a": on_gpu(spec_of("identity"))}, device=DEVICE, stage=stage)
    for seed in range(2):
        host.run([ExpertCall("a", random_rows(64, seed=seed))])
    num_bytes = stage.buffers.num_bytes
    for seed in range(20):
        host.run([ExpertCall("a", random_rows(64, seed=seed))])
    assert stage.buffers.num_bytes == num_bytes > 0


def test_rows_beyond_the_buffers_limit_travel_all_the_same() -> None:
    stage = CudaStage(DEVICE, max_buffer_bytes=64 << 10)
    host = ExpertHost({"a": on_gpu(spec_of("identity"))}, device=DEVICE, stage=stage)
    rows = random_rows(4096)
    outcomes = host.run([ExpertCall("a", rows[:3000]), ExpertCall("a", rows[3000:])])
    assert torch.equal(torch.cat([outcome.rows for outcome in outcomes if outcome.rows is not None]), rows)
    assert stage.buffers.num_bytes == 0


def test_an_expert_that_raises_costs_only_its_calls() -> None:
    class RefusesNegative(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            if bool((rows < 0).any()):
                raise ValueError("negative row")
            return rows

    expert = replace(on_gpu(spec_of("identity")), module=RefusesNegative())
    host = ExpertHost({"a": expert}, device=DEVICE)
    bad, good = host.run([ExpertCall("a", torch.full((1, 16), -1.0)), ExpertCall("a", torch.ones(2, 16))])
    assert bad.error == "a: the expert raised ValueError: negative row"
    assert good.rows is not None
    assert torch.equal(good.rows, torch.ones(2, 16))


def test_rows_that_an_expert_refuses_or_spoils_fail_alone() -> None:
    class RefusesNegative(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            if bool((rows < 0).any()):
                raise ValueError("negative row")
            return 1 / rows

    expert = replace(on_gpu(spec_of("identity")), module=RefusesNegative(), probe=None)
    given = torch.ones(32, 16)
    given[5], given[20] = -1.0, 0.0
    (outcome,) = ExpertHost({"a": expert}, device=DEVICE).run([ExpertCall("a", given)])
    expected = torch.ones(32, 16)
    expected[[5, 20]] = 0.0
    assert outcome.failed_rows == (5, 20)
    assert outcome.rows is not None
    assert torch.equal(outcome.rows, expected)


def test_an_expert_on_the_gpu_passes_the_probe_that_was_made_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    spec = spec_of("feed_forward", width=256)
    module = initial_module(spec)
    save_weights(path, module.state_dict(), probe=golden_probe(module, module.contract))
    expert = build_expert(replace(spec, weights=str(path)), device=DEVICE)
    assert expert.probe is not None
    assert expert.probe.rows.device.type == "cuda"
    for parameter in expert.module.parameters():
        parameter.data.mul_(2)
    host = ExpertHost({"a": expert}, device=DEVICE)
    host.run([ExpertCall("a", torch.full((1, 256), 3e38))])
    assert host.unfit is not None


def test_the_time_of_a_forward_is_the_devices() -> None:
    (outcome,) = ExpertHost({"a": on_gpu(spec_of("swiglu"))}, device=DEVICE).run([ExpertCall("a", random_rows(8))])
    assert outcome.compute_ms > 0
