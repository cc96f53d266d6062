"""Deploying onto a cluster: once, again, otherwise, after a death midway, and away again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import AlreadyRunningError, PlugInError
from moe_runtime.experts.build import initial_module
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.weights import save_weights, sha256_of
from moe_runtime.launch.build import build_router
from moe_runtime.launch.bundle_store import BundleStore
from moe_runtime.launch.deploy import DeployOptions, deploy
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.launch.runtime import attach
from moe_runtime.launch.served import Runtime
from moe_runtime.launch.teardown import teardown
from moe_runtime.launch.weights_recipe import WeightsRecipe
from moe_runtime.ray_backend.cluster import connect
from moe_runtime.ray_backend.deployment import DepotPlan
from moe_runtime.ray_backend.names import controller_name, depot_name
from moe_runtime.ray_backend.ray_spawner import find_actor
from moe_runtime.ray_backend.session import launch
from moe_runtime.ray_backend.starting import create_controller
from moe_runtime.rpc.client import MoEClient

OPTIONS = {"hidden_features": 16, "out_features": 4}
#: Everything on one host, because every process takes seconds to import torch.
WITH_WEIGHTS = {
    "experts": [{"kind": "feed_forward", "count": 2, "weights": "w/e{i}.safetensors", "options": OPTIONS}],
    "experts_per_actor": 2,
}


@pytest.fixture
def write_config(tmp_path, make_config):
    """Writes a configuration with two weight files beside it; gives its path."""

    def write(name, **layer):
        folder = tmp_path / name
        (folder / "w").mkdir(parents=True, exist_ok=True)
        for i in range(2):
            spec = ExpertSpec("l", i, f"e{i}", "feed_forward", (8,), options=OPTIONS, seed=i + 1)
            save_weights(folder / "w" / f"e{i}.safetensors", initial_module(spec).state_dict())
        path = folder / "config.yaml"
        path.write_text(json.dumps(make_config(name, **{**WITH_WEIGHTS, **layer})))
        return path

    return write


def serves(address):
    with MoEClient(address) as client:
        return client.forward(torch.zeros(1, 8), layer="l", timeout_s=20.0).report.num_served


@pytest.mark.timeout(240)
def test_a_deployment_is_left_alone_when_repeated_refused_when_changed_and_leaves_nothing(
    write_config, actor_names, state_folder
):
    config = write_config("shipped")
    first = deploy(config)
    assert serves(first.addresses[0]) == 2
    before = actor_names("shipped")

    again = deploy(config)
    assert (again.ran_already, first.ran_already) == (True, False)
    assert (again.addresses, again.deployment) == (first.addresses, first.deployment)
    with attach("shipped") as runtime:
        assert runtime.describe()["deployment"] == first.deployment

    write_config("shipped", timeout_ms=100)
    with pytest.raises(AlreadyRunningError, match=r"found deployment .*; `moe-runtime upgrade` rolls to another"):
        deploy(config)
    assert actor_names("shipped") == before
    assert serves(first.addresses[0]) == 2

    gone = teardown("shipped")
    # The refused one was bundled too.
    assert (gone.ran, gone.all_answered, gone.cleaned.bundles.num_files) == (True, True, 2)
    assert actor_names("shipped") == []
    assert not state_folder.exists()
    assert teardown("shipped").did_nothing


@pytest.mark.timeout(240)
def test_a_runtime_that_was_served_is_not_taken_for_a_deployment(write_config, runtime):
    with pytest.raises(AlreadyRunningError, match="found a runtime that was served"):
        deploy(write_config("shared"))
    assert serves(runtime.address) == 2
    assert BundleStore().remove("shared").num_files == 1


DEPLOY = "import sys; from moe_runtime.launch.deploy import deploy; deploy(sys.argv[1])"


@pytest.mark.timeout(240)
def test_a_deployment_whose_deployer_is_killed_midway_ends_healthy_when_repeated(
    write_config, cluster, actor_names, eventually
):
    config = write_config("killed")
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    with subprocess.Popen([sys.executable, "-c", DEPLOY, str(config)], env=environment) as deployer:
        eventually(lambda: [name for name in actor_names("killed") if "/expert/" in name], deadline_s=120.0)
        deployer.send_signal(signal.SIGKILL)
    deployed = deploy(config)
    assert serves(deployed.addresses[0]) == 2
    assert teardown("killed").ran


def lower_level(config: Path, cluster: str):
    """Plan and depot of a deployment whose hosts do not see the bundle's folder, as those of other nodes."""
    stored = BundleStore().store(config)
    elsewhere = Path("/elsewhere")
    loaded = replace(load_config(stored.config), base_dir=elsewhere)
    listed = {str(elsewhere / file.path): file.sha256 for file in stored.bundle.files}
    joined = connect(cluster)
    plan = plan_runtime(
        loaded.config,
        build_router(loaded, nodes_have_paths=True),
        cluster=joined,
        detach=True,
        weights=WeightsRecipe(stored.bundle.runtime, stored.bundle.id, listed),
    )
    return plan, DepotPlan(stored.bundle.id, stored.paths, node_id=joined.node_id)


@pytest.mark.timeout(240)
def test_a_controller_that_was_never_told_to_start_is_cleared_away(write_config, cluster, actor_names):
    config = write_config("abandoned")
    plan, _ = lower_level(config, cluster)
    create_controller(plan)
    assert actor_names("abandoned") == [controller_name("abandoned")]
    assert serves(deploy(config).addresses[0]) == 2
    teardown("abandoned")


@pytest.mark.timeout(240)
def test_hosts_fetch_their_experts_files_once_and_no_others_and_teardown_removes_them(
    write_config, cluster, state_folder
):
    config = write_config("far", gate={"kind": "linear"})
    plan, depot = lower_level(config, cluster)
    with Runtime(launch(plan, depot=depot), detached=True) as runtime:
        assert serves(runtime.address) == 2
    files = [config.parent / "w" / f"e{i}.safetensors" for i in range(2)]
    served = ray.get(find_actor(depot_name("far", depot.deployment)).served.remote())
    assert list(served.values()) == [{sha256_of(file): file.stat().st_size for file in files}]
    cached = {path.stem for path in (state_folder / "weights").glob("*.safetensors")}
    assert cached == {sha256_of(file) for file in files}
    cleaned = teardown("far").cleaned
    assert (cleaned.weights.num_files, cleaned.weights.num_bytes) == (2, sum(f.stat().st_size for f in files))
    assert not state_folder.exists()


@pytest.mark.timeout(120)
def test_a_node_with_another_version_of_a_plug_in_is_named(write_config, actor_names):
    config = write_config("outdated")
    data = {**json.loads(config.read_text()), "plug_ins": ["picky-expert==2.0"]}
    config.write_text(json.dumps(data))
    expected = r"^node \S+: expected picky-expert 2\.0, found 1\.0; `--install` installs it, or run `pip install picky"
    with pytest.raises(PlugInError, match=expected):
        deploy(config)
    assert actor_names("outdated") == []
    assert not teardown("outdated").ran


FRESH = """
from torch import nn
from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind


class Options(StrictModel):
    pass


class Fresh(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.contract = ExpertContract(shape, shape)

    def forward(self, rows):
        return rows + 1


KIND = ExpertKind("fresh", Options, lambda in_shape, options: Fresh(in_shape))
"""


def write_wheel(folder):
    info = "fresh_expert-1.0.dist-info"
    with zipfile.ZipFile(folder / "fresh_expert-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fresh_expert.py", FRESH)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fresh-expert\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[moe_runtime.experts]\nfresh = fresh_expert:KIND\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.timeout(240)
def test_a_plug_in_that_nodes_lack_is_installed_there_when_asked_for(write_config, wheel_folder):
    write_wheel(wheel_folder)
    config = write_config("fresh", experts=[{"kind": "fresh"}], policy={"kind": "switch"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "plug_ins": ["fresh-expert==1.0"]}))
    with pytest.raises(PlugInError, match=r"expected fresh-expert 1\.0, found none; `--install` installs it"):
        deploy(config)
    steps: list[str] = []
    deployed = deploy(config, options=DeployOptions(install=True, on_step=steps.append))
    assert serves(deployed.addresses[0]) == 1
    assert [step for step in steps if step.startswith("installing fresh-expert==1.0 on node ")]
    teardown("fresh")


@pytest.mark.timeout(240)
def test_nodes_that_do_not_join_are_waited_for_as_long_as_a_start_may_take_and_then_done_without(write_config):
    config = write_config("patient")
    config.write_text(json.dumps({**json.loads(config.read_text()), "start_timeout_s": 60.0, "plug_ins": ["nowhere"]}))
    steps: list[str] = []
    # Where as many are there as was asked for, nothing is waited for, or said.
    with pytest.raises(PlugInError):
        deploy(config, options=DeployOptions(num_nodes=1, on_step=steps.append))
    assert not [step for step in steps if "have joined" in step]
    config.write_text(json.dumps({**json.loads(config.read_text()), "start_timeout_s": 0.5}))
    with pytest.raises(PlugInError):
        deploy(config, options=DeployOptions(num_nodes=2, on_step=steps.append))
    assert [step for step in steps if "have joined" in step] == [
        "1 of 2 nodes have joined; waiting for the others",
        "1 of 2 nodes have joined within 0.5 s; going on without the others",
    ]
    teardown("patient")
