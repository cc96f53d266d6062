"""The service's promise: every accepted request gets exactly one answer, whatever happens meanwhile."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from fakes.service import FakeClock, GivenLogits, make_layer, tokens_of
from moe_runtime.config.models import OnFailureConfig
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import (
    DeadlineExceededError,
    ExpertError,
    InternalError,
    MoERuntimeError,
    OverloadedError,
    RequestCancelledError,
    ShapeError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.pending import Ticket
from moe_runtime.service.ports import Delivery, HostReply, SegmentResult
from moe_runtime.service.requests import LayerAnswer, LayerRequest
from moe_runtime.service.router_service import RouterService
from moe_runtime.service.routing_table import Replica, RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.wire.messages import RequestOptions

WAIT_S = 20.0


class Mailbox:
    """Collects answers, and counts how often each request was answered."""

    def __init__(self) -> None:
        self._arrived: Queue[LayerAnswer | MoERuntimeError] = Queue()

    def __call__(self, answer: LayerAnswer | MoERuntimeError) -> None:
        self._arrived.put(answer)

    def take(self) -> LayerAnswer | MoERuntimeError:
        return self._arrived.get(timeout=WAIT_S)

    def answer(self) -> LayerAnswer:
        answer = self.take()
        assert isinstance(answer, LayerAnswer), answer
        return answer

    @property
    def is_empty(self) -> bool:
        return self._arrived.empty()


class Setting:
    """A service over real in-process transports; the test plays the one host of both experts."""

    def __init__(self, layer: RoutedLayer | None = None, *, clock: FakeClock | None = None, **router: object) -> None:
        self.layer = layer or make_layer(3, gate_features=3, timeout_s=WAIT_S)
        network = InProcessNetwork()
        self.host = network.host_transport()
        self.service = RouterService(
            {"layer": self.layer},
            network.router_transport(),
            router=RouterConfig(**{"max_batch_tokens": 8, "max_wait_ms": 1.0, "max_queued_tokens": 64, **router}),
            limits=LimitsConfig(max_concurrent_requests=5, default_timeout_s=WAIT_S),
            clock=clock,
        )
        experts = range(self.layer.num_experts)
        self.table = RoutingTable(1, {("layer", e): (Replica(f"layer/{e}/0", self.host.endpoint),) for e in experts})
        self.service.set_table(self.table)
        self.service.start()
        self.mailbox = Mailbox()
        self.received: deque[Delivery] = deque()

    def submit(self, tokens: torch.Tensor, **changes: object) -> Ticket:
        request = LayerRequest(**{"request_id": "r", "layer": "layer", "tokens": tokens, **changes})
        return self.service.submit(request, self.mailbox)

    def receive(self) -> Delivery:
        """The next message to the host."""
        end = time.monotonic() + WAIT_S
        while not self.received and time.monotonic() < end:
            self.received.extend(self.host.receive(WAIT_S))
        return self.received.popleft()

    def reply(self, delivery: Delivery, times: float = 2.0) -> None:
        request = delivery.request
        results = tuple(SegmentResult(s.replica_id, s.num_rows, compute_ms=1.5) for s in request.segments)
        self.host.reply(delivery, HostReply(request.ticket, results, request.rows * times))


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.service.close()
    made.host.close()


def test_a_request_is_answered_with_its_rows_and_a_complete_report(setting: Setting) -> None:
    tokens = tokens_of(4)
    setting.submit(tokens, request_id="mine", return_routing=True)
    setting.reply(setting.receive())
    answer = setting.mailbox.answer()
    assert torch.allclose(answer.outputs, 2.0 * tokens)
    report = answer.report
    assert (report.request_id, report.num_tokens, report.num_served, report.batch_tokens) == ("mine", 4, 4, (4,))
    assert report.expert_ids is not None
    assert report.expert_ids.tolist() == [2, 2, 2, 2]
    assert report.timings.total_ms >= report.timings.experts_ms > 0.0


def test_requests_that_wait_together_travel_together_and_get_their_own_rows_back(setting: Setting) -> None:
    setting.submit(tokens_of(1), request_id="first")
    first = setting.receive()
    boxes = [Mailbox(), Mailbox()]
    for number, box in enumerate(boxes):
        request = LayerRequest(f"mate-{number}", "layer", tokens_of(4) + 10 * number)
        setting.service.submit(request, box)
    second = setting.receive()
    assert second.request.rows.shape[0] == 8
    setting.reply(second)
    for number, box in enumerate(boxes):
        answer = box.answer()
        assert torch.allclose(answer.outputs, 2.0 * (tokens_of(4) + 10 * number))
        assert answer.report.batch_tokens == (8,)
        assert answer.report.num_assignments == 4
    setting.reply(first)
    assert setting.mailbox.answer().report.request_id == "first"


def test_a_large_request_comes_back_whole_from_its_batches(setting: Setting) -> None:
    tokens = tokens_of(20)
    setting.submit(tokens, return_routing=True)
    for _ in range(3):
        setting.reply(setting.receive())
    answer = setting.mailbox.answer()
    assert torch.allclose(answer.outputs, 2.0 * tokens)
    assert answer.report.batch_tokens == (8, 8, 4)
    assert answer.report.num_served == 20
    assert answer.report.token_ids is not None
    np.testing.assert_array_equal(answer.report.token_ids, np.arange(20))


def test_an_empty_request_gets_an_empty_answer(setting: Setting) -> None:
    setting.submit(torch.zeros(0, 3))
    answer = setting.mailbox.answer()
    assert answer.outputs.shape == (0, 3)
    assert answer.report.num_assignments == 0


def test_an_unknown_layer_and_a_wrong_shape_are_refused_in_the_callers_thread(setting: Setting) -> None:
    with pytest.raises(UnknownLayerError, match="expected one of the layers layer, found 'other'"):
        setting.submit(tokens_of(1), layer="other")
    with pytest.raises(ShapeError):
        setting.submit(torch.zeros(1, 4))
    assert setting.mailbox.is_empty


def test_a_deadline_that_has_passed_is_refused(setting: Setting) -> None:
    with pytest.raises(DeadlineExceededError, match="before it was queued"):
        setting.submit(tokens_of(1), deadline=time.monotonic() - 1.0)


def test_a_request_is_answered_at_its_deadline_and_its_batch_mates_are_not_disturbed() -> None:
    clock = FakeClock()
    setting = Setting(clock=clock)
    setting.submit(tokens_of(1))
    first = setting.receive()
    mate = Mailbox()
    setting.submit(tokens_of(4), deadline=clock.now() + 1.0)
    setting.service.submit(LayerRequest("mate", "layer", tokens_of(4)), mate)
    second = setting.receive()
    assert second.request.rows.shape[0] == 8
    clock.advance(1.0)
    setting.service.set_table(setting.table)  # wakes the service, which looks at the time
    error = setting.mailbox.take()
    assert isinstance(error, DeadlineExceededError)
    setting.reply(second)
    assert torch.allclose(mate.answer().outputs, 2.0 * tokens_of(4))
    setting.reply(first)
    setting.mailbox.answer()
    assert setting.mailbox.is_empty
    assert setting.service.status()["num_deadline_exceeded"] == 1
    setting.service.close()


def test_a_request_that_waits_in_the_queue_can_be_cancelled_and_frees_its_place() -> None:
    setting = Setting(make_layer(3, gate_features=3, timeout_s=WAIT_S, max_batches_in_flight=1))
    setting.submit(tokens_of(1))
    first = setting.receive()
    cancelled = Mailbox()
    ticket = setting.service.submit(LayerRequest("cancelled", "layer", tokens_of(30)), cancelled)
    setting.service.cancel(ticket)
    assert isinstance(cancelled.take(), RequestCancelledError)
    assert setting.service.status()["layers"]["layer"]["queued_tokens"] == 0
    setting.reply(first)
    setting.mailbox.answer()
    setting.service.cancel(ticket)
    setting.service.close()
    assert cancelled.is_empty


def test_a_dispatched_request_can_be_cancelled_and_its_rows_are_discarded(setting: Setting) -> None:
    ticket = setting.submit(tokens_of(2))
    delivery = setting.receive()
    setting.service.cancel(ticket)
    assert isinstance(setting.mailbox.take(), RequestCancelledError)
    setting.reply(delivery)
    setting.submit(tokens_of(1))
    setting.reply(setting.receive())
    assert setting.mailbox.answer().outputs.shape == (1, 3)
    assert setting.mailbox.is_empty


def test_a_full_queue_refuses_at_once_and_the_service_goes_on() -> None:
    setting = Setting(make_layer(3, gate_features=3, timeout_s=WAIT_S, max_batches_in_flight=1))
    setting.submit(tokens_of(1))
    first = setting.receive()
    waiting = [Mailbox(), Mailbox()]
    for number, box in enumerate(waiting):
        setting.service.submit(LayerRequest(f"waiting-{number}", "layer", tokens_of(30)), box)
    with pytest.raises(OverloadedError, match="60 tokens wait, 5 more would exceed 64") as refused:
        setting.submit(tokens_of(5))
    assert refused.value.retry_after_ms > 0
    assert setting.service.status()["num_refused"] == 1
    setting.reply(first)
    setting.mailbox.answer()
    for _ in range(8):
        setting.reply(setting.receive())
    assert all(box.answer().report.num_served == 30 for box in waiting)
    setting.service.close()


def test_more_open_requests_than_the_limit_are_refused(setting: Setting) -> None:
    for _ in range(5):
        setting.submit(tokens_of(1))
    with pytest.raises(OverloadedError, match="the router holds 5 requests, its limit"):
        setting.submit(tokens_of(1))


def test_a_dropped_assignment_is_counted_when_no_expert_is_there(setting: Setting) -> None:
    setting.service.set_table(RoutingTable(2))
    setting.submit(tokens_of(3))
    report = setting.mailbox.answer().report
    assert (report.num_served, report.num_dropped_failure, report.table_version) == (0, 3, 2)
    assert report.warnings == ("expert expert-2: no replica is ready",)


class BrokenGate(GivenLogits):
    def forward(self, gate_input: torch.Tensor, *, tasks: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError(f"secret detail about {gate_input.shape}")


def test_a_gate_that_raises_fails_its_batch_and_nothing_else() -> None:
    setting = Setting(make_layer(3, gate_features=3, gate=BrokenGate()))
    for _ in range(2):
        setting.submit(tokens_of(2))
        error = setting.mailbox.take()
        assert isinstance(error, InternalError)
        assert "secret" not in str(error)
    assert setting.service.status()["open_requests"] == 0
    setting.service.close()


def test_a_caller_that_cannot_take_its_answer_does_not_stop_the_others(setting: Setting) -> None:
    def refuse(answer: LayerAnswer | MoERuntimeError) -> None:
        raise RuntimeError(f"cannot take {answer}")

    setting.service.submit(LayerRequest("rude", "layer", torch.zeros(0, 3)), refuse)
    setting.submit(torch.zeros(0, 3))
    assert setting.mailbox.answer().report.num_tokens == 0


def test_draining_refuses_new_requests_and_waits_for_the_open_ones(setting: Setting) -> None:
    setting.submit(tokens_of(1))
    delivery = setting.receive()
    assert setting.service.drain(timeout_s=0.0) is False
    with pytest.raises(UnavailableError, match="shutting down"):
        setting.submit(tokens_of(1))
    drained: Queue[bool] = Queue()
    waiter = threading.Thread(target=lambda: drained.put(setting.service.drain(timeout_s=WAIT_S)))
    waiter.start()
    setting.reply(delivery)
    assert drained.get(timeout=WAIT_S) is True
    waiter.join()
    assert setting.mailbox.answer().outputs.shape == (1, 3)


def test_closing_answers_what_is_still_open(setting: Setting) -> None:
    setting.submit(tokens_of(1))
    setting.receive()
    setting.service.close()
    setting.service.close()
    assert isinstance(setting.mailbox.take(), UnavailableError)
    with pytest.raises(UnavailableError):
        setting.submit(tokens_of(1))


def test_a_service_that_was_never_started_can_be_closed() -> None:
    layer = make_layer(3, gate_features=3)
    transport = InProcessNetwork().router_transport()
    service = RouterService({"layer": layer}, transport, router=RouterConfig(), limits=LimitsConfig())
    box = Mailbox()
    service.submit(LayerRequest("r", "layer", tokens_of(1)), box)
    service.close()
    assert isinstance(box.take(), UnavailableError)


def test_describe_and_status_show_experts_replicas_and_counters(setting: Setting) -> None:
    setting.submit(tokens_of(4), options=RequestOptions(task="x"))
    setting.reply(setting.receive())
    assert setting.mailbox.answer().report.warnings == (
        "option task has no effect: the gate of layer layer has one part for all tasks",
    )
    layer = setting.service.describe()["layers"]["layer"]
    assert layer["item_shape"] == [3]
    assert layer["policy"] == "top_k"
    assert layer["experts"][2]["replicas"][0]["replica_id"] == "layer/2/0"
    status = setting.service.status()
    assert (status["num_requests"], status["num_answered"], status["open_requests"]) == (1, 1, 0)
    counters = status["layers"]["layer"]
    assert (counters["num_batches"], counters["num_tokens"], counters["batches_in_flight"]) == (1, 4, 0)
    assert counters["experts"][2] == {
        "num_asked": 4,
        "num_served": 4,
        "num_dropped_capacity": 0,
        "num_dropped_failure": 0,
        "num_retried": 0,
        "num_rerouted": 0,
        "num_hedged": 0,
        "num_timed_out": 0,
        "num_failed_attempts": 0,
        "num_products": 1,
        "compute_ms": 1.5,
    }


def test_many_threads_get_their_own_answers_exactly_once(setting: Setting) -> None:
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for delivery in setting.host.receive(WAIT_S):
                setting.reply(delivery)

    wrong: list[str] = []

    def call(caller: int) -> None:
        for number in range(30):
            box = Mailbox()
            tokens = tokens_of(1 + number % 5) + 100.0 * caller
            setting.service.submit(LayerRequest(f"{caller}-{number}", "layer", tokens), box)
            answer = box.take()
            if not isinstance(answer, LayerAnswer) or not torch.allclose(answer.outputs, 2.0 * tokens):
                wrong.append(f"{caller}-{number}")
            elif not box.is_empty:
                wrong.append(f"{caller}-{number} twice")

    host = threading.Thread(target=serve)
    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for thread in (host, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    setting.host.wake()
    host.join()
    assert wrong == []
    status = setting.service.status()
    assert status["num_requests"] == status["num_answered"] == 120
    assert status["layers"]["layer"]["experts"][2]["num_served"] == sum(1 + n % 5 for n in range(30)) * 4


def test_an_engine_that_fails_answers_its_requests_and_refuses_new_ones(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.submit(tokens_of(1))
    setting.receive()
    not_a_table: Any = object()
    setting.service.set_table(not_a_table)
    assert isinstance(setting.mailbox.take(), UnavailableError)
    with pytest.raises(UnavailableError):
        setting.submit(tokens_of(1))
    assert "the router's engine failed" in caplog.text


def test_a_request_whose_expert_fails_is_answered_with_an_error_where_the_layer_says_so() -> None:
    layer = make_layer(
        2, gate_features=2, item_shape=(2,), out_shape=(2,), on_failure=OnFailureConfig(order=("error",))
    )
    network = InProcessNetwork()
    host = network.host_transport()
    service = RouterService({"layer": layer}, network.router_transport(), router=RouterConfig(), limits=LimitsConfig())
    service.set_table(RoutingTable(1, {("layer", 1): (Replica("layer/1/0", host.endpoint),)}))
    service.start()
    box = Mailbox()
    service.submit(LayerRequest("r", "layer", torch.tensor([[9.0, 0.0], [0.0, 9.0]])), box)
    (delivery,) = host.receive(WAIT_S)
    results = tuple(SegmentResult(s.replica_id, s.num_rows) for s in delivery.request.segments)
    host.reply(delivery, HostReply(delivery.request.ticket, results, delivery.request.rows))
    error = box.take()
    assert isinstance(error, ExpertError)
    assert str(error) == "layer layer: expert expert-0: no replica is ready"
    assert service.status()["num_failed"] == 1
    service.close()
    assert delivery.request.request_ids == ("r",)
