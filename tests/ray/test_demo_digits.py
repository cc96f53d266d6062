"""The main job on real actors: the whole demo with its own recipe, as a newcomer runs it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.demos.digits import run


@pytest.mark.timeout(240)
def test_the_demo_classifies_real_images_with_five_kinds_of_experts_in_five_actors(
    cluster: str, actor_names: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path))
    console = Console(file=io.StringIO(), width=100)

    result = run(json_path=tmp_path / "result.json", console=console)

    assert result.accuracy >= 0.975
    assert result.max_difference <= 1e-5
    assert result.num_dropped_failure == 0
    assert [expert.kind for expert in result.experts] == ["conv", "recurrent", "transformer", "feed_forward", "fourier"]
    assert min(expert.accuracy for expert in result.experts) >= 0.95
    assert min(expert.num_assignments for expert in result.experts) > 0
    assert len({os.getpid(), *(expert.pid for expert in result.experts)}) == 6
    assert result.training_s is not None
    assert result.training_s < 90
    assert json.loads((tmp_path / "result.json").read_text())["p99_ms"] == result.p99_ms
    assert actor_names("digits-demo") == []
