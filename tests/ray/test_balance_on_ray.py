"""Skewed traffic spreads over the experts by a bias that outlives the controller, and counts nothing twice."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from fakes.skewed import TOKENS, skewed_layer
from moe_runtime.launch.runtime import serve, upgrade
from moe_runtime.rpc.client import MoEClient

pytestmark = pytest.mark.timeout(240)

NUM_ROUTERS = 2


def config_of(name, layer):
    return {
        "name": name,
        "device": "cpu",
        "layers": {"l": layer},
        "router": {"address": "127.0.0.1:0", "replicas": NUM_ROUTERS},
        "start_timeout_s": 150,
    }


def balance_of(runtime):
    return runtime.describe()["balance"]["l"]


def counted(runtime):
    """Assignments that the controller has counted."""
    balance = balance_of(runtime)
    return balance["num_assignments"] + balance["num_assignments_since"]


def biases_at(address):
    """The biases that a router selects by."""
    with MoEClient(address) as client:
        return client.describe()["layers"]["l"]["balance"]["values"]


def asked_at(addresses):
    """Assignments that the present processes of routers were asked for."""
    num_asked = 0
    for address in addresses:
        with MoEClient(address) as client:
            num_asked += sum(expert["num_asked"] for expert in client.status()["layers"]["l"]["experts"])
    return num_asked


def send(address, *, times):
    """Have one router route the tokens so many times; the number of assignments."""
    with MoEClient(address) as client:
        for _ in range(times):
            assert torch.equal(client.forward(TOKENS, layer="l", timeout_s=30.0).outputs, TOKENS)
    return times * len(TOKENS)


@contextmanager
def skewed_traffic(addresses):
    """One caller in a closed loop per router."""
    stop = threading.Event()

    def call(address):
        while not stop.is_set():
            send(address, times=1)

    with ThreadPoolExecutor(len(addresses)) as pool:
        calls = [pool.submit(call, address) for address in addresses]
        try:
            yield
        finally:
            stop.set()
            for each in calls:
                each.result(60.0)


def test_skewed_traffic_spreads_and_neither_a_dead_router_nor_a_dead_controller_upsets_it(tmp_path, eventually):
    layer = {**skewed_layer(tmp_path, interval_s=0.2), "experts_per_actor": 4}
    with serve(config_of("balanced", layer)) as runtime:
        with skewed_traffic(runtime.addresses):
            first = eventually(lambda: (now := balance_of(runtime))["num_steps"] and now)
            assert first["load_ratio"] > 2.0
            eventually(lambda: balance_of(runtime)["load_ratio"] < 1.35)
        busiest = balance_of(runtime)["values"]
        assert busiest[0] == min(busiest) < -0.1

        # A router that dies takes no count back, and its successor's are counted from 0.
        num_asked = asked_at(runtime.addresses)
        victim = runtime.describe()["routers"][0]
        os.kill(victim["pid"], signal.SIGKILL)

        def is_back():
            router = runtime.describe()["routers"][0]
            return router["state"] == "ready" and router["pid"] != victim["pid"]

        eventually(is_back)
        assert runtime.describe()["addresses"] == list(runtime.addresses)
        before = counted(runtime)
        assert before <= num_asked
        eventually(lambda: balance_of(runtime)["num_steps"] and biases_at(runtime.addresses[0]))
        num_sent = sum(send(address, times=20) for address in runtime.addresses)
        eventually(lambda: counted(runtime) == before + num_sent)
        num_asked += num_sent

        # A controller that dies leaves the biases in the table, and its successor counts no load again.
        eventually(lambda: balance_of(runtime)["num_assignments_since"] == 0)
        # The table with what it computed last is on its way.
        eventually(lambda: all(biases_at(each) == balance_of(runtime)["values"] for each in runtime.addresses))
        before, dead = balance_of(runtime), runtime.describe()["controller_pid"]
        os.kill(dead, signal.SIGKILL)
        eventually(lambda: runtime.describe()["controller_pid"] != dead)
        after = balance_of(runtime)
        assert {key: after[key] for key in ("values", "num_steps", "num_assignments")} == {
            key: before[key] for key in ("values", "num_steps", "num_assignments")
        }
        eventually(lambda: all(biases_at(each) == before["values"] for each in runtime.addresses))
        with skewed_traffic(runtime.addresses):
            eventually(lambda: balance_of(runtime)["num_steps"] >= before["num_steps"] + 5)
            # Not as at first: what was learned is still there.
            assert balance_of(runtime)["load_ratio"] < 1.6
        assert counted(runtime) - before["num_assignments"] <= asked_at(runtime.addresses) - num_sent


def test_an_upgrade_carries_biases_by_the_names_of_experts(tmp_path, eventually):
    # Enough for one step, and then by far too few for another.
    num_needed = 40 * len(TOKENS)
    layer = {**skewed_layer(tmp_path, interval_s=0.2, min_assignments=num_needed), "experts_per_actor": 4}
    with serve(config_of("rebalanced", layer)) as runtime:
        eventually(lambda: send(runtime.address, times=5) and balance_of(runtime)["num_steps"])
        before = balance_of(runtime)
        assert before["num_assignments_since"] < num_needed / 2
        assert before["values"][0] == min(before["values"]) < 0
        upgrade(config_of("rebalanced", {**layer, "experts": layer["experts"][::-1]}))
        names = [expert["name"] for expert in runtime.describe()["layers"]["l"]["experts"]]
        assert names == ["e3", "e2", "e1", "e0"]
        expected = pytest.approx(before["values"][::-1])
        eventually(lambda: all(biases_at(address) == expected for address in runtime.addresses))
