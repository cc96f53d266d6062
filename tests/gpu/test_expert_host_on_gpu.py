"""Experts on a CUDA device give the CPU's answers. Runs where there is one: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.experts.build import build_expert
from moe_runtime.experts.host import ExpertCall, ExpertHost
from moe_runtime.experts.spec import ExpertSpec

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


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_host_on_the_gpu_agrees_with_one_on_the_cpu(kind: str, dtype: str) -> None:
    spec = ExpertSpec(
        layer="layer", expert_id=0, name="expert", kind=kind, item_shape=(16,), options=SPECS[kind], dtype=dtype
    )
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    outputs = []
    for device in ("cpu", "cuda"):
        host = ExpertHost({"layer/expert/0": build_expert(spec, device=device)}, device=device)
        (outcome,) = host.run([ExpertCall("layer/expert/0", rows)])
        assert outcome.error is None
        assert outcome.rows is not None
        assert outcome.rows.device.type == "cpu"
        outputs.append(outcome.rows.float())
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
