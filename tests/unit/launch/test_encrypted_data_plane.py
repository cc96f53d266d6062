"""A router and a host that take each other to be on another node, and so talk over tcp."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import StartError, TransportError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.factories import ExpertProcessFactory, RouterProcessFactory
from moe_runtime.launch.packing import plan_hosts
from moe_runtime.ray_backend.plan import Location
from moe_runtime.rpc.client import MoEClient
from moe_runtime.service.routing_table import Replica, RoutingTable

TOKENS = torch.arange(8.0).reshape(2, 4) + 1


def location(node):
    return Location(node, "127.0.0.1", num_cores=1, pid=1)


class Pair:
    """A host on one node with one expert, which gives back what it gets, and a router on another."""

    def __init__(self, encryption):
        layer = {"item_shape": [4], "experts": [{"kind": "identity"}], "policy": {"kind": "switch"}, "residual": "none"}
        data = {"device": "cpu", "layers": {"l": layer}, "data_plane": {"encryption": encryption}}
        loaded = load_config(data)
        recipe = build_router(loaded)
        (spec,) = plan_hosts(loaded.config, recipe.layers, gpus_available=False)
        # As actors get them.
        make_host = pickle.loads(pickle.dumps(ExpertProcessFactory(spec)))
        make_router = pickle.loads(pickle.dumps(RouterProcessFactory(recipe)))
        self.host = make_host(location("node-0"), num_threads=torch.get_num_threads())
        self.router = make_router(location("node-1"))

    def start(self):
        self.endpoint = self.host.start().endpoint
        self.report = self.router.start("127.0.0.1:0")

    def introduce(self):
        """Give the router its table."""
        replica = Replica("l/identity-0/0", self.endpoint, weights_version="seed:0", device="cpu", pid=1)
        self.router.set_table(RoutingTable(1, {("l", 0): (replica,)}))

    def ask(self):
        with MoEClient(self.report.address) as client:
            return client.forward(TOKENS, layer="l", timeout_s=20.0)

    def close(self):
        self.router.close()
        self.host.stop()


@pytest.fixture
def make_pair():
    with contextlib.ExitStack() as stack:

        def make(encryption):
            pair = stack.enter_context(contextlib.closing(Pair(encryption)))
            pair.start()
            return pair

        yield make


def test_a_router_that_was_admitted_is_answered_over_curve(make_pair):
    pair = make_pair("curve")
    assert pair.endpoint.public_key is not None
    pair.host.admit([pair.report.public_key])
    pair.introduce()
    result = pair.ask()
    assert result.report.num_served == 2
    torch.testing.assert_close(result.outputs, TOKENS)


def test_a_router_that_was_not_admitted_gets_no_answer_but_dropped_failures(make_pair):
    pair = make_pair("curve")
    stranger = make_pair("curve").report
    pair.host.admit([stranger.public_key])
    pair.introduce()
    result = pair.ask()
    assert (result.report.num_served, result.report.num_dropped_failure) == (0, 2)
    torch.testing.assert_close(result.outputs, torch.zeros(2, 4))


def test_without_encryption_nobody_needs_a_key(make_pair):
    pair = make_pair("none")
    assert (pair.endpoint.public_key, pair.report.public_key) == (None, None)
    pair.introduce()
    assert pair.ask().report.num_served == 2


def test_a_malformed_key_is_a_transport_error(make_pair):
    with pytest.raises(TransportError, match="expected 32 bytes in Z85"):
        make_pair("curve").host.admit(["short"])


def test_a_host_that_was_not_started_lets_nobody_in():
    with pytest.raises(StartError, match="not started"):
        Pair("curve").host.admit([])
