"""A router says which of its threads does not turn, so that whoever keeps it can replace its process."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.runtime import LimitsConfig
from moe_runtime.launch.build import build_router
from moe_runtime.launch.router_process import RouterProcess, build_setup
from moe_runtime.launch.turn_watch import TurnWatch
from moe_runtime.service.router_service import RouterService
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


def test_a_router_says_nothing_while_it_turns_also_when_it_was_not_started_or_drains(router):
    assert router.standstill() is None
    router.start("127.0.0.1:0")
    assert [router.standstill() for _ in range(3)] == [None] * 3
    assert router.drain(1.0)
    assert router.standstill() is None


def test_an_engine_that_is_held_up_takes_its_turn_when_it_goes_on(transport):
    setup = build_setup(build_router(load_config(CONFIG)))
    service = RouterService(setup.layers, transport, router=setup.router, limits=LimitsConfig())
    service.start()
    transport.gate.clear()
    transport.wake()
    assert transport.is_held.wait(10.0)
    turn = service.next_turn()
    assert not turn.done()
    transport.gate.set()
    assert turn.result(10.0) is None
    service.close()
    assert not service.next_turn().done()


class Thread:
    """Takes its turns when the test says so."""

    def __init__(self):
        self.now = 0.0
        self.asked = []
        self.watch = TurnWatch(self.ask, limit_s=4.0, now=lambda: self.now)

    def ask(self):
        self.asked.append(Future())
        return self.asked[-1]

    def look(self, at):
        self.now = at
        return self.watch.stands_still()


def test_a_thread_stands_still_when_the_turn_that_was_asked_for_does_not_come():
    thread = Thread()
    assert [thread.look(at) for at in (0.0, 2.0, 4.0, 4.1, 9.0)] == [False, False, False, True, True]
    assert len(thread.asked) == 1
    thread.asked[0].set_result(None)
    assert [thread.look(at) for at in (10.0, 14.0, 14.1)] == [False, False, True]


def test_a_slow_thread_does_not_stand_still():
    thread = Thread()
    for second in range(20):
        assert not thread.look(float(second))
        if second % 3 == 0:
            thread.asked[-1].set_result(None)
