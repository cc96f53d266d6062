"""Actors that take each other to be on different nodes: tcp and CURVE, and who is let in after a restart."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import ray
import torch
from ray import cloudpickle

from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_router
from moe_runtime.launch.factories import RouterProcessFactory
from moe_runtime.launch.plans import plan_runtime
from moe_runtime.ray_backend.cluster import connect
from moe_runtime.ray_backend.names import NAMESPACE, expert_name
from moe_runtime.ray_backend.session import launch
from moe_runtime.rpc.client import MoEClient

ONE_EXPERT = {"experts": [{"kind": "identity"}], "policy": {"kind": "switch"}, "timeout_ms": 5000}


@pytest.fixture
def session(cluster, make_config):
    """A runtime of one expert whose router is, by its own account, on another node than its host."""
    loaded = load_config(make_config("apart", **ONE_EXPERT))
    recipe = build_router(loaded)

    def make_router_elsewhere(location):
        return RouterProcessFactory(recipe)(replace(location, node="elsewhere"))

    plan = plan_runtime(loaded.config, recipe, cluster=connect(None), detach=False)
    routers = replace(plan.routers, factory=cloudpickle.dumps(make_router_elsewhere))
    session = launch(replace(plan, routers=routers))
    yield session
    session.close(drain_timeout_s=0.0)


def kept_keys(session):
    (host,) = session.describe()["hosts"]
    actor = ray.get_actor(expert_name(session.name, host["key"]), namespace=NAMESPACE)
    return ray.get(actor.kept.remote()).public_keys


def test_restarted_routers_hosts_and_controllers_still_know_each_other(session, eventually):
    (address,) = session.addresses()
    with MoEClient(address) as client:

        def is_served():
            return client.forward(torch.ones(2, 8), layer="l", timeout_s=20.0).report.num_served == 2

        assert client.describe()["node"] == "elsewhere"
        assert is_served()
        first_keys = kept_keys(session)
        assert len(first_keys) == 1
        before = session.describe()
        os.kill(before["routers"][0]["pid"], signal.SIGKILL)
        eventually(lambda: kept_keys(session) != first_keys)
        eventually(is_served)
        # The new host must be told by the new controller, which asks the router that was not restarted again.
        second_keys = kept_keys(session)
        os.kill(before["controller_pid"], signal.SIGKILL)
        eventually(lambda: session.describe()["controller_pid"] != before["controller_pid"])
        os.kill(before["hosts"][0]["pid"], signal.SIGKILL)
        eventually(lambda: session.describe()["hosts"][0]["pid"] != before["hosts"][0]["pid"])
        eventually(is_served)
        assert kept_keys(session) == second_keys
