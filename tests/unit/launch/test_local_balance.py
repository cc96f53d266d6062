"""Without Ray a thread of the process balances its routers, by the same steps."""

from __future__ import annotations

import pytest
import torch

from fakes.service import FakeClock
from fakes.skewed import EXPERTS, TOKENS, skewed_layer
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.launch.balance import LocalBalance, bias_rules
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient
from moe_runtime.service.online_bias import BiasRule
from moe_runtime.service.routing_table import RoutingTable


class Router:
    """Counts as the test says, and keeps its tables."""

    def __init__(self):
        self.loads = {"l": {"a": 0, "b": 0}}
        self.tables = []

    def asked(self, layers):
        return {name: dict(counts) for name, counts in self.loads.items() if name in layers}

    def set_table(self, table):
        self.tables.append(table)


def test_the_loads_of_all_routers_make_a_step_which_all_of_them_get():
    clock, routers = FakeClock(), [Router(), Router()]
    rules = {"l": BiasRule(("a", "b"), 0.5, interval_s=2.0, min_assignments=10)}
    balance = LocalBalance(rules, routers=routers, table=RoutingTable(1, {("l", 0): ()}), clock=clock)
    balance.turn()
    routers[0].loads, routers[1].loads = {"l": {"a": 8, "b": 0}}, {"l": {"a": 0, "b": 2}}
    clock.advance(1.9)
    balance.turn()
    assert routers[0].tables == []
    clock.advance(0.1)
    balance.turn()
    assert [router.tables[0].version for router in routers] == [2, 2]
    assert routers[1].tables[0].replicas == {("l", 0): ()}
    assert routers[1].tables[0].biases["l"].values == (-0.5, 0.5)
    clock.advance(60.0)
    balance.turn()
    assert len(routers[0].tables) == 1


def test_only_layers_that_ask_for_it_are_balanced_and_shared_experts_are_not(tmp_path):
    layer = skewed_layer(tmp_path, rate=0.25, interval_s=3.0, min_assignments=9)
    layer["shared_experts"] = [{"name": "shared", "kind": "identity"}]
    layers = {"l": layer, "still": {**layer, "balance": {}}}
    recipes = build_layers(load_config({"name": "r", "device": "cpu", "layers": layers}))
    names = tuple(expert["name"] for expert in EXPERTS)
    assert bias_rules(recipes) == {"l": BiasRule(names, 0.25, 3.0, 9)}


def test_a_policy_without_a_bias_cannot_be_balanced(tmp_path):
    layer = {**skewed_layer(tmp_path), "policy": {"kind": "switch"}}
    with pytest.raises(ConfigError, match=r"balance\.online_bias: expected policy top_k with expert_bias true"):
        load_config({"name": "r", "device": "cpu", "layers": {"l": layer}})


def test_skewed_traffic_spreads_over_the_experts_of_two_routers(tmp_path):
    config = {
        "name": "local",
        "device": "cpu",
        "layers": {"l": skewed_layer(tmp_path)},
        "router": {"address": "127.0.0.1:0", "replicas": 2},
    }
    with (
        serve(config, ray=False) as runtime,
        MoEClient(runtime.addresses[0]) as one,
        MoEClient(runtime.addresses[1]) as two,
    ):

        def balance():
            return one.describe()["layers"]["l"]["balance"]

        ratios = []
        while not ratios or ratios[-1] > 1.3:
            for client in (one, two):
                assert torch.equal(client.forward(TOKENS, layer="l", timeout_s=20.0).outputs, TOKENS)
            if balance() is not None and balance()["num_steps"] > len(ratios):
                ratios.append(balance()["load_ratio"])
        assert ratios[0] > 2.0
        assert balance()["values"][0] == -balance()["largest_bias"] < 0
        counters = [client.status()["layers"]["l"]["experts"] for client in (one, two)]
        num_asked = sum(expert["num_asked"] for experts in counters for expert in experts)
        assert balance()["num_assignments"] <= num_asked
        assert runtime.describe()["table_version"] > 1
