"""Where actors go on a cluster of several nodes, and where they come back when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: In a process of its own: this one is connected to the session's cluster, and a process has but one.
SCRIPT = """
import json, sys, time
import ray
from ray.cluster_utils import Cluster
from moe_runtime.launch.runtime import serve

SMALL = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 1, "include_dashboard": False})
nodes = {name: cluster.add_node(**SMALL, labels={"name": name, "role": "expert"}) for name in ("n1", "n2")}
ray.init(address=cluster.address, log_to_driver=False)

def name_of(node):
    for each in ray.nodes():
        if node and each["NodeID"].startswith(node.partition("/")[2]):
            return each["Labels"].get("name", "head")

def placed(runtime):
    description = runtime.describe()
    hosts = {h["host_id"]: name_of(h["node"]) if h["state"] == "ready" else None for h in description["hosts"]}
    return hosts, [name_of(router["node"]) for router in description["routers"]]

def until(is_there):
    give_up_at = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)

try:
    with serve(json.loads(sys.argv[1])) as runtime:
        before, routers = placed(runtime)
        addresses = list(runtime.addresses)
        lost = routers[0]
        cluster.remove_node(nodes[lost])
        until(lambda: not {None, lost} & {*placed(runtime)[0].values(), *placed(runtime)[1]})
        hosts, moved = placed(runtime)
    before, after = {"hosts": before, "routers": routers}, {"hosts": hosts, "routers": moved}
    print(json.dumps({"before": before, "after": after, "addresses": addresses}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def layer(**changes):
    return {"item_shape": [4], "policy": {"kind": "switch"}, **changes}


@pytest.fixture(scope="module")
def outcome():
    """What a runtime tells on a head and the nodes ``n1`` and ``n2``, before and after the loss of its router's."""
    on_workers = {"num_cpus": 0.1, "node_labels": {"role": "expert"}}
    config = {
        "name": "placed",
        "device": "cpu",
        "threads": 1,
        "start_timeout_s": 150,
        "layers": {
            "spread": layer(experts=[{"kind": "identity", "replicas": 2, "resources": {"num_cpus": 1}}]),
            "pack": layer(strategy="pack", experts=[{"kind": "identity", "count": 2, "resources": on_workers}]),
        },
        "router": {"address": "node:0", "node_labels": {"role": "expert"}},
        "security": {"insecure": True},
    }
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config)],
        env={**env, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def node_of(outcome, host_id, when="before"):
    return outcome[when]["hosts"][host_id]


@pytest.mark.timeout(300)
def test_pack_shares_a_node_that_has_the_labels_and_spread_takes_the_least_loaded_ones(outcome):
    packed = {node_of(outcome, f"pack/identity-{i}/0") for i in (0, 1)}
    assert len(packed) == 1
    assert packed < {"n1", "n2"}
    (other,) = {"n1", "n2"} - packed
    assert [node_of(outcome, f"spread/identity-0/{n}") for n in (0, 1)] == ["head", other]
    assert outcome["before"]["routers"] == [other]


def test_a_router_binds_its_nodes_address(outcome):
    (address,) = outcome["addresses"]
    assert not address.startswith(("0.0.0.0", "127.", "node"))


def test_what_a_lost_node_held_comes_back_on_another_away_from_its_twin(outcome):
    left = node_of(outcome, "pack/identity-0/0")
    assert node_of(outcome, "spread/identity-0/1", "after") == left
    assert node_of(outcome, "spread/identity-0/0", "after") == "head"
    assert outcome["after"]["routers"] == [left]
