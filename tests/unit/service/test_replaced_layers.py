"""Layers that are replaced under load: nobody's request is lost, and no answer is of two minds."""

from __future__ import annotations

import threading
import time
from collections import deque
from queue import Queue

import pytest
import torch

from fakes.service import GivenLogits, make_layer, tokens_of
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import InvalidRequestError, UnknownLayerError
from moe_runtime.service.generations import RouterSetup
from moe_runtime.service.ports import HostReply, SegmentResult
from moe_runtime.service.requests import LayerAnswer, LayerRequest
from moe_runtime.service.router_service import RouterService
from moe_runtime.service.routing_table import Replica, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

WAIT_S = 20.0
OLD, NEW = 2.0, 3.0


class LastFirst(GivenLogits):
    """A gate: the more positive the tokens, the more it prefers the last expert."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, gate_input, *, tasks=None):
        return gate_input.sum(1, keepdim=True) * torch.arange(self.num_experts)


class Host:
    """A host that multiplies rows by its own number when the test says so."""

    def __init__(self, network, times):
        self.times = times
        self.transport = network.host_transport()
        self.waiting = deque()

    def replica(self, expert_id):
        return Replica(f"layer/{expert_id}/0", self.transport.endpoint)

    def receive(self):
        end = time.monotonic() + WAIT_S
        while not self.waiting and time.monotonic() < end:
            self.waiting.extend(self.transport.receive(WAIT_S))
        return self.waiting.popleft()

    def answer(self, delivery=None):
        delivery = delivery or self.receive()
        request = delivery.request
        results = tuple(SegmentResult(s.replica_id, s.num_rows, compute_ms=1.0) for s in request.segments)
        self.transport.reply(delivery, HostReply(request.ticket, results, request.rows * self.times))


class Setting:
    """A service with a layer of three experts at an old host, and a new host for what comes after."""

    def __init__(self):
        network = InProcessNetwork()
        self.old, self.new = Host(network, OLD), Host(network, NEW)
        self.service = RouterService(
            {"layer": self.layer()},
            network.router_transport(),
            router=RouterConfig(max_batch_tokens=4, max_wait_ms=1.0),
            limits=LimitsConfig(default_timeout_s=WAIT_S),
        )
        self.service.set_table(self.table(1, self.old))
        self.service.start()
        self.answers = Queue()

    def layer(self, num_experts=3, **changes):
        """A layer whose gate prefers the last expert."""
        fields = {"gate": LastFirst(num_experts), "gate_features": 3, "timeout_s": WAIT_S, "max_batches_in_flight": 1}
        return make_layer(num_experts, **{**fields, **changes})

    def table(self, version, host, num_experts=3):
        return RoutingTable(version, {("layer", e): (host.replica(e),) for e in range(num_experts)})

    def submit(self, num_tokens, request_id="r"):
        request = LayerRequest(request_id, "layer", tokens_of(num_tokens), return_routing=True)
        self.service.submit(request, self.answers.put)

    def replace(self, *layers, version=2, host=None, num_experts=3, **router):
        setup = RouterSetup({layer.name: layer for layer in layers}, RouterConfig(**{"max_batch_tokens": 4, **router}))
        self.service.replace_setup(setup, self.table(version, host or self.new, num_experts))

    def oldest(self):
        return self.service.oldest_table_version(WAIT_S)

    def answer(self):
        answer = self.answers.get(timeout=WAIT_S)
        assert isinstance(answer, LayerAnswer), answer
        return answer

    def close(self):
        self.service.close()
        self.old.transport.close()
        self.new.transport.close()


@pytest.fixture
def setting():
    made = Setting()
    yield made
    made.close()


def test_a_batch_in_flight_is_finished_by_the_layer_that_it_was_dispatched_by(setting):
    setting.submit(2)
    delivery = setting.old.receive()
    setting.replace(setting.layer(5), num_experts=5)
    assert setting.oldest() == 1
    setting.old.answer(delivery)
    answer = setting.answer()
    assert torch.allclose(answer.outputs, OLD * tokens_of(2))
    assert answer.report.table_version == 1
    setting.submit(2)
    setting.new.answer()
    answer = setting.answer()
    assert torch.allclose(answer.outputs, NEW * tokens_of(2))
    assert answer.report.table_version == setting.oldest() == 2
    assert answer.report.expert_ids.tolist() == [4, 4]


def test_what_waited_is_served_by_the_layer_that_it_was_checked_against_and_what_comes_by_the_new_one(setting):
    setting.submit(3, "first")
    first = setting.old.receive()
    setting.submit(2, "waited")
    setting.replace(setting.layer(5), num_experts=5)
    assert setting.oldest() == 1
    setting.submit(1, "came after")
    setting.new.answer()
    assert setting.answer().report.request_id == "came after"
    setting.old.answer(first)
    setting.old.answer()
    answers = {answer.report.request_id: answer for answer in (setting.answer(), setting.answer())}
    assert torch.allclose(answers["waited"].outputs, OLD * tokens_of(2))
    assert answers["waited"].report.table_version == 1
    assert setting.oldest() == 2


def test_a_request_of_several_batches_stays_with_one_layer(setting):
    setting.submit(10)
    first = setting.old.receive()
    setting.replace(setting.layer())
    setting.old.answer(first)
    setting.old.answer()
    setting.old.answer()
    assert torch.allclose(setting.answer().outputs, OLD * tokens_of(10))
    assert setting.oldest() == 2


def test_only_a_newer_table_makes_the_older_one_forgotten_when_its_batches_have_returned(setting):
    setting.submit(2)
    delivery = setting.old.receive()
    setting.service.set_table(setting.table(7, setting.new))
    assert setting.oldest() == 1
    setting.old.answer(delivery)
    setting.answer()
    assert setting.oldest() == 7


def test_counters_go_on_for_experts_that_keep_their_name(setting):
    setting.submit(2)
    setting.old.answer()
    setting.answer()
    setting.submit(4)
    in_flight = setting.old.receive()
    setting.replace(setting.layer(5), num_experts=5)
    setting.submit(1)
    setting.new.answer()
    setting.answer()
    setting.old.answer(in_flight)
    setting.answer()
    setting.oldest()
    status = setting.service.status()
    layer = status["layers"]["layer"]
    assert (layer["num_batches"], layer["num_tokens"]) == (3, 7)
    assert [expert["num_served"] for expert in layer["experts"]] == [0, 0, 6, 0, 1]
    assert (status["num_answered"], status["num_failed"], layer["queued_requests"]) == (3, 0, 0)


def test_a_request_on_its_way_to_a_layer_that_is_gone_gets_a_typed_error_and_leaves_no_trace(setting):
    service = setting.service
    busy, go_on = threading.Event(), threading.Event()

    def hold(_answer):
        busy.set()
        go_on.wait(WAIT_S)

    # The service's thread is in a callback: what comes meanwhile is checked now and queued later.
    service.submit(LayerRequest("empty", "layer", tokens_of(0)), hold)
    assert busy.wait(WAIT_S)
    other = setting.layer(name="other")
    service.replace_setup(RouterSetup({"other": other}, RouterConfig()), RoutingTable(2))
    setting.submit(2)
    go_on.set()
    assert isinstance(setting.answers.get(timeout=WAIT_S), UnknownLayerError)
    assert setting.oldest() == 2
    with pytest.raises(UnknownLayerError):
        setting.submit(2)
    assert service.drain(WAIT_S)


def test_a_request_on_its_way_that_the_new_layer_can_serve_is_served_by_it(setting):
    busy, go_on = threading.Event(), threading.Event()

    def hold(_answer):
        busy.set()
        go_on.wait(WAIT_S)

    setting.service.submit(LayerRequest("empty", "layer", tokens_of(0)), hold)
    assert busy.wait(WAIT_S)
    setting.replace(setting.layer())
    setting.submit(2)
    go_on.set()
    setting.new.answer()
    assert torch.allclose(setting.answer().outputs, NEW * tokens_of(2))


def test_new_limits_hold_from_the_next_request_on(setting):
    setting.replace(setting.layer(), max_queued_tokens=4)
    setting.oldest()
    with pytest.raises(InvalidRequestError, match="at most 4 tokens in a request, found 5"):
        setting.submit(5)
