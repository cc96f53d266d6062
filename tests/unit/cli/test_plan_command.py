import json
from pathlib import Path

import pytest

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.cli.plan import show_plan
from moe_runtime.errors import PlacementError

CONFIG = """
name: small
device: cpu
layers:
  demo:
    item_shape: [8]
    experts: [{kind: feed_forward, count: 2, replicas: 2, resources: {num_cpus: NUM_CPUS}}]
router: {address: "node:0"}
security: {insecure: true}
"""
NODES = "nodes: [{name: n, count: 2, resources: {CPU: 2, memory: 1GiB}}]\n"


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*, num_cpus: float, cluster: bool = True) -> Path:
        config, nodes, out = tmp_path / "config.yaml", tmp_path / "nodes.yaml", tmp_path / "plan.json"
        config.write_text(CONFIG.replace("NUM_CPUS", str(num_cpus)), encoding="utf-8")
        nodes.write_text(NODES, encoding="utf-8")
        show_plan(config, cluster=nodes if cluster else None, ray_address=None, json_path=out, console=stdout_console())
        return out

    return run


def test_a_plan_shows_where_everything_goes_and_writes_it(show, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(show(num_cpus=1).read_text())
    shown = capsys.readouterr().out
    assert "small: everything has its place" in shown
    for title in ("where actors go", "Memory", "Expected load", "Traffic between nodes"):
        assert title in shown
    assert [actor["node"] for actor in document["actors"]] == ["n-0", "n-0", "n-1", "n-0", "n-1"]
    assert document["mistakes"] == []


def test_what_cannot_fit_is_refused_after_the_rest_was_shown(show, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlacementError) as caught:
        show(num_cpus=1.5)
    assert str(caught.value).splitlines() == [
        "demo/feed_forward-1/0: asks for CPU 1.5; n-0, n-1: CPU 1.5 (0.5 free of 2)",
        "demo/feed_forward-1/1: asks for CPU 1.5; n-0, n-1: CPU 1.5 (0.5 free of 2)",
    ]
    shown = capsys.readouterr().out
    assert "nowhere" in shown
    assert "everything has its place" not in shown


def test_without_a_cluster_the_plan_is_for_this_machine(show) -> None:
    document = json.loads(show(num_cpus=1, cluster=False).read_text())
    assert {actor["node"] for actor in document["actors"]} == {"this machine"}
