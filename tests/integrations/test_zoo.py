"""The canary: every family with experts gives the same logits with its experts in a runtime as without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from integrations import zoo

import moe_runtime.integrations.transformers as moe_hf
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.launch.served import Runtime

#: Where logits are not those of the model bit for bit, the largest difference allowed to logits of a scale of 4.
_INEXACT: Mapping[tuple[str, torch.dtype], float] = {
    # transformers runs every expert on all tokens there, and a product over more rows rounds otherwise.
    ("llama4", torch.float32): 2e-6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", zoo.families())
def test_logits_are_those_of_the_model_in_one_process(
    family: str, dtype: torch.dtype, tmp_path: Path, runtime: Runtime
) -> None:
    zoo.save(family, tmp_path, dtype=dtype)
    expected = zoo.logits(zoo.reference(family, tmp_path))
    model = moe_hf.load(tmp_path, runtime=runtime, auto_class=zoo.tiny(family)[1], experts_per_actor=2)
    found = zoo.logits(model)

    assert model.dtype == found.dtype == dtype
    assert sum(expert.num_assignments for layer in moe_hf.experts(model).layers for expert in layer.experts) > 0
    allowed = _INEXACT.get((family, dtype), 0.0)
    if allowed:
        torch.testing.assert_close(found, expected, atol=allowed, rtol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", zoo.families())
def test_an_expert_s_tensors_are_all_that_is_read_for_it(family: str, tmp_path: Path) -> None:
    zoo.save(family, tmp_path, dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path, architecture=zoo.tiny(family)[1].__name__)
    for layer in checkpoint.layers:
        before = checkpoint.bytes_read
        expert = checkpoint.expert(layer.module, layer.num_experts - 1)
        held = sum(parameter.numel() * parameter.element_size() for parameter in expert.parameters())
        assert checkpoint.bytes_read - before == held


def test_every_decorated_family_is_in_the_zoo_or_says_why_it_is_not() -> None:
    covered = set(zoo.families()) - set(zoo.ADAPTED)
    assert covered | set(zoo.UNBUILDABLE) == set(zoo.decorated())
    assert not covered & set(zoo.UNBUILDABLE)
    assert all(zoo.UNBUILDABLE.values())
    assert len(covered) == 64
