import contextlib
import dataclasses
import threading

import pytest
import torch

from moe_runtime.errors import TransportError
from moe_runtime.experts.build import build_expert
from moe_runtime.experts.deadline import time_left_s
from moe_runtime.experts.device_stage import Forwarded
from moe_runtime.experts.host import ExpertHost
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.service.host_loop import HostLoop
from moe_runtime.service.ports import HostRequest, Segment
from moe_runtime.transport.in_process import InProcessNetwork

DEADLINE_S = 20.0


class FakeClock:
    """A clock that tests set."""

    time = 100.0

    def now(self):
        return self.time


class CountingModule(torch.nn.Module):
    """Doubles rows, remembers how many came in each forward, and raises on a row of 13."""

    def __init__(self):
        super().__init__()
        self.forwards = []

    def forward(self, rows):
        self.forwards.append(rows.shape[0])
        if (rows == 13).any():
            raise ValueError("thirteen")
        return rows * 2


class LateStage:
    """A device that computes by itself: what began is run only when it is waited for."""

    overlaps = True

    def __init__(self):
        self.events = []

    def begin(self, forward, parts, *, dtype, row_dtype):
        self.events.append(f"begin {int(parts[0][0, 0])}")
        return LateForwarding(self, forward, parts)


class LateForwarding:
    """A forward of a ``LateStage``."""

    def __init__(self, stage, forward, parts):
        self._stage, self._forward, self._parts = stage, forward, parts

    def wait(self):
        self._stage.events.append(f"wait {int(self._parts[0][0, 0])}")
        if self._parts[0][0, 0] == 13:
            raise RuntimeError("the device failed")
        return Forwarded(self._forward(torch.cat(self._parts)), 0.0)


def load(name, kind="identity", options=None):
    spec = ExpertSpec("layer", 0, name, kind, item_shape=(2,), options=options or {})
    return build_expert(spec, device="cpu")


class System:
    """A loop over a host with three experts, and a router, on an in-process network."""

    def __init__(self, stage=None, **options):
        network = InProcessNetwork()
        self.clock = FakeClock()
        self.router = network.router_transport()
        self.transport = network.host_transport()
        self.doubles = CountingModule()
        wide = load("wide", "constant", {"out_shape": [3]})
        experts = {
            "identity": load("identity"),
            "doubles": dataclasses.replace(load("doubles"), module=self.doubles),
            "wide": wide,
        }
        self.host = ExpertHost(experts, device="cpu", stage=stage)
        self.loop = HostLoop(
            self.host,
            self.transport,
            clock=self.clock,
            **options,
        )

    def send(self, ticket, *segments, timeout_s=5.0, request_ids=(), is_suspect=False):
        """Send rows of shape (n, 2), given as (replica_id, [value of each row])."""
        rows = torch.tensor([[value] * 2 for _, values in segments for value in values]).reshape(-1, 2).float()
        listed = tuple(Segment(replica_id, len(values)) for replica_id, values in segments)
        self.router.send(self.transport.endpoint, HostRequest(ticket, listed, rows, timeout_s, request_ids, is_suspect))

    def answers(self):
        return {reply.ticket: reply for reply in self.router.poll(0.0)}

    def close(self):
        self.router.close()
        self.transport.close()


@pytest.fixture
def system():
    with contextlib.closing(System()) as made:
        yield made


def first_column(reply):
    return reply.rows[:, 0].tolist()


def test_each_segment_s_rows_come_back_in_order(system):
    system.send(1, ("doubles", [1.0, 2.0]), ("identity", [3.0]), ("doubles", [4.0]))
    system.loop.serve_once(0.0)
    reply = system.answers()[1]
    assert first_column(reply) == [2.0, 4.0, 3.0, 8.0]
    assert [(r.replica_id, r.num_rows, r.error) for r in reply.results] == [
        ("doubles", 2, None),
        ("identity", 1, None),
        ("doubles", 1, None),
    ]
    assert all(result.compute_ms >= 0 for result in reply.results)


def test_requests_that_arrived_together_run_as_one_product(system):
    for ticket in range(5):
        system.send(ticket, ("doubles", [float(ticket)] * 2))
    system.loop.serve_once(0.0)
    assert system.doubles.forwards == [10]
    assert {ticket: first_column(reply) for ticket, reply in system.answers().items()} == {
        ticket: [2.0 * ticket] * 2 for ticket in range(5)
    }
    assert (system.loop.num_requests, system.loop.num_rows) == (5, 10)


def test_empty_segments_are_answered(system):
    system.send(1, ("doubles", []), ("identity", [1.0]))
    system.send(2, ("doubles", []))
    system.loop.serve_once(0.0)
    answers = system.answers()
    assert first_column(answers[1]) == [1.0]
    assert answers[2].rows.shape == (0, 2)
    assert answers[2].results[0].error is None


def test_request_without_segments_is_answered(system):
    system.send(1)
    system.loop.serve_once(0.0)
    reply = system.answers()[1]
    assert (reply.results, reply.rows) == ((), None)


def test_unknown_replica_is_an_error_of_its_segment_alone(system):
    system.send(1, ("identity", [1.0]), ("gone", [2.0]), ("identity", [3.0]))
    system.loop.serve_once(0.0)
    reply = system.answers()[1]
    assert [result.error is None for result in reply.results] == [True, False, True]
    assert "gone" in reply.results[1].error
    assert first_column(reply) == [1.0, 3.0]
    assert system.loop.num_failed_segments == 1


def test_expert_that_raises_costs_only_the_segments_at_fault(system):
    system.send(1, ("doubles", [13.0]), ("identity", [5.0]))
    system.send(2, ("doubles", [4.0]))
    system.loop.serve_once(0.0)
    answers = system.answers()
    assert "thirteen" in answers[1].results[0].error
    assert first_column(answers[1]) == [5.0]
    assert first_column(answers[2]) == [8.0]


def test_reply_has_no_rows_when_every_segment_failed(system):
    system.send(1, ("gone", [2.0]))
    system.loop.serve_once(0.0)
    reply = system.answers()[1]
    assert reply.rows is None
    assert reply.results[0].num_rows == 1


def test_rows_that_do_not_fit_the_message_are_an_error_of_their_segment(system):
    system.send(1, ("identity", [1.0]), ("wide", [2.0]), ("identity", [3.0]))
    system.loop.serve_once(0.0)
    reply = system.answers()[1]
    assert "expected rows like the message's first, [2] torch.float32, found [3]" in reply.results[1].error
    assert first_column(reply) == [1.0, 3.0]


def test_request_that_waited_here_too_long_is_not_run_but_answered_and_counted():
    with contextlib.closing(System(max_rows_per_run=2)) as system:
        system.send(1, ("doubles", [1.0, 1.0]))
        system.send(2, ("doubles", [2.0]), timeout_s=1.0)
        system.send(3, ("doubles", [3.0]), timeout_s=2.0)
        system.loop.serve_once(0.0)
        assert system.answers().keys() == {1}
        system.clock.time += 1.5
        system.loop.serve_once(0.0)
        answers = system.answers()
        assert answers.keys() == {2, 3}
        assert answers[2].rows is None
        assert answers[2].results[0].error == "it waited at its host for longer than 1.0 s"
        assert system.loop.num_skipped_late == 1
        assert system.doubles.forwards == [2, 1]


def test_one_run_takes_whole_requests_up_to_its_limit_and_a_larger_one_alone():
    with contextlib.closing(System(max_rows_per_run=4)) as system:
        for ticket, num_rows in enumerate([2, 2, 1, 9, 1]):
            system.send(ticket, ("doubles", [1.0] * num_rows))
        for expected in ({0, 1}, {2}, {3}, {4}, set()):
            system.loop.serve_once(0.0)
            assert system.answers().keys() == expected
        assert system.doubles.forwards == [4, 1, 9, 1]


def test_requests_that_arrive_between_runs_join_those_that_wait():
    with contextlib.closing(System(max_rows_per_run=3)) as system:
        system.send(1, ("doubles", [1.0, 1.0]))
        system.send(2, ("doubles", [1.0, 1.0]))
        system.loop.serve_once(0.0)
        system.send(3, ("doubles", [1.0]))
        system.loop.serve_once(DEADLINE_S)
        assert system.answers().keys() == {1, 2, 3}
        assert system.doubles.forwards == [2, 3]


def test_more_requests_than_may_wait_stay_with_the_transport():
    with contextlib.closing(System(max_rows_per_run=1, max_waiting=2)) as system:
        for ticket in (1, 2, 3):
            system.send(ticket, ("doubles", [1.0]))
        system.loop.serve_once(0.0)
        system.send(4, ("doubles", [1.0]))
        system.loop.serve_once(0.0)
        assert system.loop.num_requests == 3
        system.loop.serve_once(0.0)
        system.loop.serve_once(0.0)
        assert system.answers().keys() == {1, 2, 3, 4}


def test_reply_that_cannot_travel_becomes_an_error_of_every_segment(system):
    class NarrowTransport:
        """A transport that carries no rows back."""

        def __init__(self, inner):
            self._inner = inner

        def receive(self, timeout_s):
            return self._inner.receive(timeout_s)

        def reply(self, delivery, reply):
            if reply.rows is not None:
                raise TransportError("rows: 9 bytes, at most 1")
            self._inner.reply(delivery, reply)

    loop = HostLoop(ExpertHost({"identity": load("identity")}, device="cpu"), NarrowTransport(system.transport))
    system.send(1, ("identity", [1.0]), ("gone", [1.0]))
    loop.serve_once(0.0)
    reply = system.answers()[1]
    assert reply.rows is None
    assert reply.results[0].error == "rows: 9 bytes, at most 1"
    assert "gone" in reply.results[1].error
    assert loop.num_failed_segments == 2


def test_answer_to_a_router_that_is_gone_harms_nobody(system):
    system.send(1, ("identity", [1.0]))
    system.router.close()
    system.loop.serve_once(0.0)
    assert system.transport.counters.num_discarded == 1


def test_a_suspect_is_run_by_itself_and_its_router_is_told_first(system):
    system.send(1, ("doubles", [1.0]))
    system.send(2, ("doubles", [2.0]), is_suspect=True)
    system.send(3, ("doubles", [3.0]), is_suspect=True)
    system.send(4, ("doubles", [4.0]))
    heard = []
    for _ in range(4):
        system.loop.serve_once(0.0)
        heard.append([(reply.ticket, reply.is_begun) for reply in system.router.poll(0.0)])
    assert heard == [[(1, False)], [(2, True), (2, False)], [(3, True), (3, False)], [(4, False)]]


def test_run_serves_until_it_is_stopped(system):
    thread = threading.Thread(target=system.loop.run)
    thread.start()
    for ticket in (1, 2, 3):
        system.send(ticket, ("doubles", [float(ticket)]))
        (reply,) = system.router.poll(DEADLINE_S)
        assert first_column(reply) == [2.0 * ticket]
    system.loop.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_run_returns_at_once_when_it_was_stopped_before(system):
    system.send(1, ("identity", [1.0]))
    system.loop.stop()
    system.loop.run()
    assert system.answers() == {}


def test_loop_waits_with_the_machine_s_clock_when_given_none(system):
    loop = HostLoop(ExpertHost({"identity": load("identity")}, device="cpu"), system.transport)
    system.send(1, ("identity", [1.0]))
    loop.serve_once(0.0)
    assert first_column(system.answers()[1]) == [1.0]


def test_a_device_that_computes_by_itself_gets_the_next_run_before_this_one_is_awaited():
    stage = LateStage()
    with contextlib.closing(System(stage, max_rows_per_run=1)) as system:
        for ticket in (1, 2, 3):
            system.send(ticket, ("identity", [float(ticket)]))
        answered = []
        for _ in range(3):
            system.loop.serve_once(0.0)
            answered.append({ticket: first_column(reply) for ticket, reply in system.answers().items()})
        assert answered == [{}, {1: [1.0]}, {2: [2.0], 3: [3.0]}]
        assert stage.events == ["begin 1", "begin 2", "wait 1", "begin 3", "wait 2", "wait 3"]


def test_a_run_that_nothing_follows_is_answered_at_once():
    with contextlib.closing(System(LateStage())) as system:
        system.send(1, ("identity", [1.0]))
        system.loop.serve_once(0.0)
        assert first_column(system.answers()[1]) == [1.0]


def test_a_run_under_way_is_answered_before_the_loop_stops():
    class StoppingStage(LateStage):
        def begin(self, *args, **options):
            system.loop.stop()
            return super().begin(*args, **options)

    with contextlib.closing(System(StoppingStage(), max_rows_per_run=1)) as system:
        for ticket in (1, 2):
            system.send(ticket, ("identity", [float(ticket)]))
        system.loop.run()
        assert system.answers().keys() == {1}


def test_calls_that_make_their_device_fail_cost_only_themselves():
    stage = LateStage()
    with contextlib.closing(System(stage)) as system:
        system.send(1, ("identity", [13.0]), ("doubles", [2.0]))
        system.send(2, ("identity", [5.0]))
        system.loop.serve_once(0.0)
        answers = system.answers()
        assert answers[1].results[0].error == "identity: the expert raised RuntimeError: the device failed"
        assert first_column(answers[1]) == [4.0]
        assert first_column(answers[2]) == [5.0]


def test_rows_that_fail_alone_are_named_and_zero_in_the_reply(system):
    system.send(1, ("doubles", [1.0, 13.0, 3.0]), ("identity", [float("inf"), 5.0]))
    system.send(2, ("doubles", [13.0]), ("identity", [7.0]))
    system.loop.serve_once(0.0)
    answers = system.answers()
    assert [(r.failed_rows, r.has_rows) for r in answers[1].results] == [((1,), True), ((), True)]
    assert first_column(answers[1]) == [2.0, 0.0, 6.0, float("inf"), 5.0]
    assert [(r.failed_rows, r.has_rows) for r in answers[2].results] == [((), False), ((), True)]
    assert first_column(answers[2]) == [7.0]
    assert system.loop.num_failed_segments == 2


def test_rows_that_fail_alone_but_cannot_travel_are_an_error_of_the_whole_segment(system):
    class Spoiled(torch.nn.Module):
        def forward(self, rows):
            return torch.tensor([[1.0] * 3, [float("nan")] * 3])

    experts = {"identity": load("identity"), "wide": load("wide", "constant", {"out_shape": [3]})}
    experts["wide"] = dataclasses.replace(experts["wide"], module=Spoiled(), probe=None)
    loop = HostLoop(ExpertHost(experts, device="cpu"), system.transport)
    system.send(1, ("identity", [1.0]), ("wide", [2.0, 3.0]))
    loop.serve_once(0.0)
    reply = system.answers()[1]
    assert (reply.results[1].failed_rows, reply.results[1].has_rows) == ((), False)
    assert first_column(reply) == [1.0]


def test_the_search_for_culprits_ends_when_every_request_of_the_run_is_late(system):
    def raise_later(rows):
        system.clock.time += 1.0
        raise ValueError("always")

    system.doubles.forward = raise_later
    system.send(1, ("doubles", [1.0] * 64), timeout_s=2.5)
    system.send(2, ("doubles", [1.0] * 64), timeout_s=0.5)
    started_at = system.clock.time
    system.loop.serve_once(0.0)
    # The merged forward, and two halves, after which nobody waits any more.
    assert system.clock.time - started_at == 3.0
    assert all(not result.has_rows for reply in system.answers().values() for result in reply.results)


def test_the_log_names_at_most_three_requests_and_how_many_more(system, caplog):
    system.send(1, ("gone", [1.0]), request_ids=("a", "b", "c", "d", "e"))
    system.send(2, ("gone", [1.0]))
    system.send(3, ("identity", [1.0]), request_ids=("fine",))
    system.loop.serve_once(0.0)
    first, second = caplog.records
    assert first.getMessage().startswith("requests a, b, c and 2 more: gone: expected one of this host's replicas")
    assert first.request_ids == ["a", "b", "c", "d", "e"]
    assert second.getMessage().startswith("requests of unknown id: gone")


def test_what_waits_and_what_is_with_the_experts_is_counted_as_waiting():
    seen = []
    with contextlib.closing(System(max_rows_per_run=1)) as system:
        forward = system.doubles.forward

        def note(rows):
            system.clock.time += 0.5
            seen.append((system.loop.num_waiting, system.loop.busy_s))
            return forward(rows)

        system.doubles.forward = note
        for ticket in (1, 2):
            system.send(ticket, ("doubles", [1.0]))
        assert (system.loop.num_waiting, system.loop.busy_s) == (0, 0.0)
        for _ in range(2):
            system.loop.serve_once(0.0)
        assert seen == [(2, 0.5), (1, 0.5)]
        assert (system.loop.num_waiting, system.loop.busy_s) == (0, 0.0)


def test_a_run_that_is_awaited_later_keeps_its_host_busy_until_then():
    with contextlib.closing(System(LateStage(), max_rows_per_run=1)) as system:
        for ticket in (1, 2):
            system.send(ticket, ("identity", [float(ticket)]))
        system.loop.serve_once(0.0)
        system.clock.time += 2.0
        assert (system.loop.num_waiting, system.loop.busy_s) == (2, 2.0)
        system.loop.serve_once(0.0)
        assert (system.loop.num_waiting, system.loop.busy_s) == (0, 0.0)


def test_a_request_that_is_too_late_no_longer_waits_and_is_not_logged(caplog):
    with contextlib.closing(System()) as system:
        system.send(1, ("doubles", [1.0]), timeout_s=-1.0)
        system.loop.serve_once(0.0)
        assert (system.loop.num_waiting, system.loop.num_skipped_late) == (0, 1)
    assert caplog.records == []


def test_counters_tell_what_the_loop_has_done():
    with contextlib.closing(System(max_rows_per_run=1)) as system:
        for ticket in (1, 2):
            system.send(ticket, ("doubles", [1.0]))
        system.loop.serve_once(0.0)
        system.clock.time += 0.75
        system.loop.serve_once(0.0)
        loop = system.loop
        assert (loop.num_requests, loop.num_answered, loop.num_waiting, loop.num_rows) == (2, 2, 0, 2)
        assert system.host.experts["doubles"].queue_s == 0.75


def test_experts_may_know_for_how_long_somebody_waits_for_a_merged_forward(system):
    seen = []

    class Asking(torch.nn.Module):
        def forward(self, rows):
            seen.append(time_left_s())
            return rows

    experts = {"asks": dataclasses.replace(load("asks"), module=Asking())}
    loop = HostLoop(ExpertHost(experts, device="cpu"), system.transport, clock=system.clock)
    system.send(1, ("asks", [1.0]), timeout_s=50.0)
    system.send(2, ("asks", [2.0]), timeout_s=90.0)
    loop.serve_once(0.0)
    # One forward for both, of use until the second is given up.
    assert [50.0 < left_s <= 90.0 for left_s in seen] == [True]
