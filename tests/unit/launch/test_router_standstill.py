"""A router says which of its threads does not turn, so that whoever keeps it can replace its process."""

from __future__ import annotations

import threading

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_router
from moe_runtime.launch.router_process import RouterProcess
from moe_runtime.transport.in_process import InProcessNetwork

CONFIG = {
    "device": "cpu",
    "layers": {"l": {"item_shape": [4], "experts": [{"kind": "identity"}], "policy": {"kind": "switch"}}},
    "router": {"address": "127.0.0.1:0"},
}


class GatedTransport:
    """The router's end of a network, whose poll waits for a gate."""

    def __init__(self, transport):
        self._transport = transport
        self.gate = threading.Event()
        self.gate.set()
        self.is_held = threading.Event()

    def poll(self, timeout_s):
        if not self.gate.is_set():
            self.is_held.set()
        self.gate.wait()
        return self._transport.poll(timeout_s)

    def __getattr__(self, name):
        return getattr(self._transport, name)


@pytest.fixture
def transport():
    return GatedTransport(InProcessNetwork().router_transport())


@pytest.fixture
def router(transport):
    made = RouterProcess(build_router(load_config(CONFIG)), open_transport=lambda: transport, node="n1")
    yield made
    transport.gate.set()
    made.close()


def test_a_router_that_was_not_started_does_not_stand_still(router):
    assert router.standstill() is None


def test_a_router_that_turns_says_nothing_also_while_it_drains(router):
    router.start("127.0.0.1:0")
    assert router.standstill() is None
    assert router.drain(1.0)
    assert router.standstill() is None


def test_an_engine_that_is_held_up_is_named_until_it_goes_on(router, transport):
    router.start("127.0.0.1:0")
    transport.gate.clear()
    transport.wake()
    assert transport.is_held.wait(10.0)
    assert router.standstill() == "its engine has not turned within 0.6 s"
    transport.gate.set()
    assert router.standstill() is None


def test_a_router_that_was_closed_does_not_turn(router):
    router.start("127.0.0.1:0")
    router.close()
    assert router.standstill() == "its engine has not turned within 0.6 s"
