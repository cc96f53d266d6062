"""What the controller is told of each host, beyond what runs there."""

from __future__ import annotations

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_router
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.ray_backend.cluster import Cluster

CLUSTER = Cluster("127.0.0.1:1", "node", num_gpus=0.0, embedded=False, connected_here=False)


@pytest.fixture
def hosts():
    """The plans of hosts of two layers, by their ids."""

    def layer(timeout_ms, **resources):
        expert = {"name": "same", "kind": "identity", "resources": resources}
        return {"item_shape": [4], "experts": [expert], "policy": {"kind": "switch"}, "timeout_ms": timeout_ms}

    config = {"device": "cpu", "layers": {"quick": layer(500), "big": layer(7000, max_rss_bytes=1 << 30)}}
    loaded = load_config(config)
    plan = plan_runtime(loaded.config, build_router(loaded), cluster=CLUSTER, detach=False)
    return {host.host_id: host for host in plan.hosts}


def test_a_host_may_take_as_long_for_a_forward_as_its_layer_waits(hosts):
    assert {host_id: host.max_forward_s for host_id, host in hosts.items()} == {"quick/same/0": 0.5, "big/same/0": 7.0}


def test_a_host_may_grow_to_what_its_resources_say(hosts):
    assert {host_id: host.demand.max_rss_bytes for host_id, host in hosts.items()} == {
        "quick/same/0": None,
        "big/same/0": 1 << 30,
    }


def test_successors_of_a_host_have_names_of_their_own(hosts):
    host = hosts["big/same/0"]
    assert host.generation == 0
    assert host.key == f"big/same/0@{host.revision}"
