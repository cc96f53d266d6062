"""Requests through a real client, a real router actor and real expert actors."""

from __future__ import annotations

import os
import time

import pytest
import ray
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import AlreadyRunningError, PlacementError, StartError
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient


def reference(config, tokens):
    """Top-2 of 2 by hand: every expert, weighted by the softmax over both."""
    (recipe,) = build_layers(load_config(config))
    experts = [build_expert(expert.spec) for expert in recipe.experts]
    with torch.inference_mode():
        weights = build_routed_layer(recipe).gate(tokens).softmax(dim=-1)
        return sum(weights[:, i : i + 1] * expert.module(tokens) for i, expert in enumerate(experts))


def test_an_answer_from_actors_equals_the_reference_in_one_process(runtime, make_config):
    tokens = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    with MoEClient(runtime.address) as client:
        result = client.forward(tokens, layer="l", timeout_s=20.0)
    assert result.report.num_served == 14
    torch.testing.assert_close(result.outputs, reference(make_config("shared"), tokens), atol=1e-6, rtol=0)


def test_every_expert_has_an_actor_process_of_its_own(runtime, actor_names):
    description = runtime.describe()
    pids = {host["pid"] for host in description["hosts"]} | {description["routers"][0]["pid"]}
    assert len(pids) == 3
    assert os.getpid() not in pids
    first, second = (host["key"] for host in description["hosts"])
    assert first.startswith("l/feed_forward-0/0@")
    assert actor_names("shared") == [
        "shared/controller",
        f"shared/expert/{first}",
        f"shared/expert/{second}",
        "shared/router/0",
    ]
    assert [e["replicas"][0]["state"] for e in description["layers"]["l"]["experts"]] == ["ready", "ready"]


def test_a_second_runtime_of_one_name_is_refused_and_harms_nobody(runtime, make_config):
    with pytest.raises(AlreadyRunningError, match="runtime shared: one of this name is running"):
        serve(make_config("shared", router={"address": runtime.address}))
    with MoEClient(runtime.address) as client:
        assert client.forward(torch.zeros(1, 8), layer="l", timeout_s=20.0).report.num_served == 2


def test_a_port_that_is_taken_is_told_before_any_expert_starts(runtime, make_config, actor_names):
    seen = []
    with pytest.raises(StartError, match=f"^router.address {runtime.address}: expected a free port, found it taken"):
        serve(make_config("late", router={"address": runtime.address}), on_progress=lambda *ready: seen.append(ready))
    assert seen == []
    assert actor_names("late") == []


def test_an_expert_that_raises_in_its_actor_fails_the_start_with_its_text(make_config, actor_names):
    experts = [{"kind": "picky", "options": {"allowed_pid": os.getpid()}}]
    config = make_config("raises", experts=experts, policy={"kind": "switch"})
    with pytest.raises(StartError, match=r"expert host l/picky-0/0 on node .*the licence server is gone"):
        serve(config)
    assert actor_names("raises") == []


def test_gpus_that_the_cluster_lacks_are_a_placement_error_within_the_bound(make_config, actor_names):
    config = {**make_config("greedy"), "device": "cuda", "start_timeout_s": 3.0}
    started_at = time.monotonic()
    with pytest.raises(PlacementError, match=r"asks for CPU 0\.1, GPU 1; the cluster has .*GPU 0 free of 0"):
        serve(config)
    assert time.monotonic() - started_at < 50.0
    assert actor_names("greedy") == []


def test_packed_experts_share_an_actor_with_its_resources_and_close_leaves_nothing(
    make_config, actor_names, eventually
):
    expert = {
        "kind": "feed_forward",
        "options": {"hidden_features": 8, "out_features": 4},
        "resources": {"num_cpus": 0.2, "custom": {"fast": 0.5}},
    }
    config = make_config("packed", experts=[{**expert, "count": 4}], experts_per_actor=2)
    runtime = serve(config)
    try:
        hosts = runtime.describe()["hosts"]
        assert [host["replicas"] for host in hosts] == [
            ["l/feed_forward-0/0", "l/feed_forward-1/0"],
            ["l/feed_forward-2/0", "l/feed_forward-3/0"],
        ]
        eventually(lambda: ray.available_resources().get("fast") == 1.0)
        with MoEClient(runtime.address) as client:
            assert client.forward(torch.randn(9, 8), layer="l", timeout_s=20.0).report.num_served == 18
    finally:
        assert runtime.close()
    assert actor_names("packed") == []
    eventually(lambda: ray.available_resources().get("fast") == 2.0)
    assert ray.is_initialized()
