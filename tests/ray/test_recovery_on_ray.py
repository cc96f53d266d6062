"""What is killed comes back, and requests go on meanwhile."""

from __future__ import annotations

import os
import signal

import torch

from moe_runtime.rpc.client import MoEClient
from moe_runtime.transport.ipc_folder import default_ipc_folder


def state_of(runtime, host):
    return runtime.describe()["hosts"][host]


def is_back(runtime, host, old_pid):
    now = state_of(runtime, host)
    return now["state"] == "ready" and now["pid"] != old_pid


def test_a_killed_expert_costs_its_assignments_and_comes_back(runtime, eventually, caplog):
    before = runtime.describe()
    killed = before["hosts"][0]["pid"]
    old = before["layers"]["l"]["experts"][0]["replicas"][0]["incarnation"]
    tokens = torch.randn(4, 8)
    reports = []
    with MoEClient(runtime.address) as client:

        def ask():
            reports.append(client.forward(tokens, layer="l", timeout_s=20.0).report)
            return reports[-1]

        assert ask().num_served == 8
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: ask().num_dropped_failure == 4)
        eventually(lambda: is_back(runtime, 0, killed))
        eventually(lambda: ask().num_served == 8)
    assert not list(default_ipc_folder().glob(f"{killed}-*"))
    host_id = before["hosts"][0]["host_id"]
    eventually(lambda: f"runtime shared: expert host {host_id} is out: " in caplog.text)
    for report in reports:
        assert report.num_served + report.num_dropped_failure == 8
        assert report.num_served >= 4
    after = runtime.describe()
    assert after["hosts"][0]["num_restarts"] >= 1
    assert after["table_version"] > before["table_version"]
    assert after["layers"]["l"]["experts"][0]["replicas"][0]["incarnation"] != old


def test_traffic_goes_on_without_the_controller_which_then_still_brings_experts_back(runtime, eventually):
    before = runtime.describe()
    tokens = torch.randn(4, 8)
    with MoEClient(runtime.address) as client:
        os.kill(before["controller_pid"], signal.SIGKILL)
        assert client.forward(tokens, layer="l", timeout_s=20.0).report.num_served == 8

        def resumed():
            description = runtime.describe()
            return description if description["controller_pid"] != before["controller_pid"] else None

        after = eventually(resumed)
        eventually(lambda: all(host["state"] == "ready" for host in runtime.describe()["hosts"]))
        assert [host["pid"] for host in runtime.describe()["hosts"]] == [host["pid"] for host in before["hosts"]]
        assert after["addresses"] == before["addresses"]
        eventually(lambda: runtime.describe()["table_version"] > before["table_version"])
        killed = before["hosts"][1]["pid"]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: is_back(runtime, 1, killed))
        eventually(lambda: client.forward(tokens, layer="l", timeout_s=20.0).report.num_served == 8)


def test_a_killed_router_comes_back_at_its_address_with_the_table(runtime, eventually):
    before = runtime.describe()["routers"][0]
    os.kill(before["pid"], signal.SIGKILL)

    def restarted():
        router = runtime.describe()["routers"][0]
        return router["state"] == "ready" and router["pid"] != before["pid"]

    eventually(restarted)
    assert runtime.describe()["routers"][0]["address"] == before["address"]
    with MoEClient(before["address"]) as client:
        eventually(lambda: client.forward(torch.randn(2, 8), layer="l", timeout_s=20.0).report.num_served == 4)
