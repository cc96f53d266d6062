"""A router that has just started refuses requests until it knows where its experts are."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import UnavailableError
from moe_runtime.launch.build import build_router
from moe_runtime.launch.router_process import RouterProcess
from moe_runtime.rpc.client import MoEClient
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

CONFIG = {
    "device": "cpu",
    "layers": {"l": {"item_shape": [4], "experts": [{"kind": "identity"}], "policy": {"kind": "switch"}}},
    "router": {"address": "127.0.0.1:0"},
}


def test_a_router_without_a_table_sends_clients_to_another_instead_of_dropping_their_assignments():
    network = InProcessNetwork()
    router = RouterProcess(build_router(load_config(CONFIG)), open_transport=network.router_transport, node="n1")
    address = router.start("127.0.0.1:0").address
    with MoEClient(address) as client:
        with pytest.raises(UnavailableError, match="knows no experts yet; send the request to another"):
            client.forward(torch.ones(2, 4), layer="l", timeout_s=10.0)
        router.set_table(RoutingTable(1))
        report = client.forward(torch.ones(2, 4), layer="l", timeout_s=10.0).report
    router.close()
    assert (report.table_version, report.num_dropped_failure) == (1, 2)
