"""Every policy on real actors: the whole demo of routers, on five expert actors that stay while policies change."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.demos.routers import run
from moe_runtime.demos.routers.policies import POLICIES


@pytest.mark.timeout(240)
def test_every_policy_is_served_by_the_same_five_actors(
    cluster: str, actor_names: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path))
    console = Console(file=io.StringIO(), width=100)

    result = run(json_path=tmp_path / "result.json", console=console)

    assert [policy.name for policy in result.policies] == [policy.name for policy in POLICIES]
    assert len({os.getpid(), *result.pids}) == 6
    assert max(policy.max_difference for policy in result.policies) <= 1e-5
    accuracies = {policy.name: policy.accuracy for policy in result.policies}
    assert accuracies["dense"] >= 0.975
    assert accuracies["top_k"] >= 0.97
    assert json.loads((tmp_path / "result.json").read_text())["pids"] == list(result.pids)
    assert actor_names("routers-demo") == []
