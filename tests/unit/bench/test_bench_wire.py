"""The parts of suite `wire` that need no Ray: hosts in processes of their own, and the error of a narrow wire."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from moe_runtime.bench.children import Child
from moe_runtime.bench.deployment import layer_config, recipe_of
from moe_runtime.bench.hosts import NODE, hosts_of, layer_in_process, serve_hosts, table_of
from moe_runtime.bench.library import LibraryLayer
from moe_runtime.bench.wire_error import WireError, measure_errors
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.transport.zmq_router import ZmqTransport

CONFIG = layer_config(num_experts=2, experts_per_actor=2)
TOKENS = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("node", [NODE, "elsewhere"])
@pytest.mark.parametrize("encryption", ["curve", "none"])
def test_hosts_in_a_process_serve_routers_of_every_encryption_and_node(encryption: str, node: str):
    hosts = [replace(host, encryption=encryption) for host in hosts_of(CONFIG)]
    with Child(serve_hosts, hosts, preload=[serve_hosts.__module__]) as child:
        table = table_of(hosts, child.answer())
        transport = ZmqTransport(node=node, encryption=encryption)
        if transport.public_key is not None:
            child.ask(transport.public_key)
        layer = build_routed_layer(recipe_of(CONFIG))
        with contextlib.closing(LibraryLayer(layer, table, transport, node=node)) as library:
            assert torch.allclose(library.forward(TOKENS).outputs, TOKENS, atol=1e-5)


def test_a_layer_runs_without_any_process():
    with layer_in_process(CONFIG) as layer:
        assert torch.allclose(layer.forward(TOKENS).outputs, TOKENS, atol=1e-5)


def test_the_error_is_relative_to_the_outputs_in_percent():
    error = WireError.between(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0]))
    assert error.rms == pytest.approx(8.0)
    assert error.largest == pytest.approx(10.0)


def test_a_narrow_wire_errs_by_its_rounding_and_no_more():
    errors = dict(measure_errors("identity", {}))
    # Half a unit in the last place: 8 bits of bfloat16, 11 of float16.
    assert 0 < errors["bfloat16"].largest <= 100 / 2**8
    assert 0 < errors["float16"].largest <= 100 / 2**11
