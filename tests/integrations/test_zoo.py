"""The canary: every family with experts gives the same logits with its experts in a runtime as without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.experts.checkpoints.families import expert_modules
from moe_runtime.launch.runtime import serve

#: Where logits are not those of the model bit for bit, the largest difference allowed to logits of a scale of 4.
_INEXACT: Mapping[tuple[str, torch.dtype], float] = {
    # transformers runs every expert on all tokens there, and a product over more rows rounds otherwise.
    ("llama4", torch.float32): 2e-6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", zoo.families())
def test_logits_are_those_of_the_model_in_one_process(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    zoo.save(family, tmp_path, dtype=dtype)
    expected = zoo.logits(zoo.reference(family, tmp_path))
    config = moe_hf.config(tmp_path, experts_per_actor=2, name=family)
    with serve(config, ray=False) as runtime:
        model = moe_hf.load(tmp_path, runtime=runtime, auto_class=zoo.tiny(family)[1])
        found = zoo.logits(model)
        seen = moe_hf.experts(model)

    assert model.dtype == dtype
    assert found.dtype == expected.dtype
    assert sum(expert.num_assignments for layer in seen.layers for expert in layer.experts) > 0
    if (family, dtype) in _INEXACT:
        torch.testing.assert_close(found, expected, atol=_INEXACT[family, dtype], rtol=0)
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


@pytest.mark.parametrize("family", zoo.families())
def test_the_experts_of_a_tiny_model_show_in_its_logits(family: str, tmp_path: Path) -> None:
    zoo.save(family, tmp_path, dtype=torch.bfloat16)
    model = zoo.reference(family, tmp_path)
    before = zoo.logits(model)
    for path, holder in expert_modules(model).items():
        holder.bind(model.get_submodule(path), lambda hidden, ids: hidden.new_zeros(ids.numel(), hidden.shape[1]))
    assert not torch.equal(zoo.logits(model), before)


def test_every_decorated_family_is_in_the_zoo_or_says_why_it_is_not() -> None:
    covered = set(zoo.families()) - set(zoo.ADAPTED)
    assert covered | set(zoo.UNBUILDABLE) == set(zoo.decorated())
    assert not covered & set(zoo.UNBUILDABLE)
    assert all(zoo.UNBUILDABLE.values())
    assert len(covered) == 64
