"""A host that dies takes its messages' requests under suspicion: each is tried once more, alone."""

from __future__ import annotations

import torch

from fakes.service import FakeClock, FakeTransport, endpoint, make_layer, replica, table_of, tokens_of
from moe_runtime.errors import PoisonedRequestError
from moe_runtime.service.batch import Batch, BatchResult
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import HostLost, HostReply
from moe_runtime.service.routing_table import RoutingTable

TOKENS = tokens_of(3)
REQUESTS = {"row_starts": (0, 1, 2), "request_ids": ("a", "b", "c")}


def twins(num_replicas: int) -> RoutingTable:
    """One expert; replica n is on host 10 + n."""
    replicas = tuple(replica(0, 10 + n, n=n) for n in range(num_replicas))
    return RoutingTable(1, {("layer", 0): replicas})


class Router:
    """An engine with its fakes."""

    def __init__(self, layer: RoutedLayer, table: RoutingTable) -> None:
        self.clock = FakeClock()
        self.transport = FakeTransport()
        self.engine = RouterEngine({"layer": layer}, self.transport, node="here", clock=self.clock)
        self.engine.set_table(table)

    def submit(self, logits: torch.Tensor, **changes: object) -> None:
        self.engine.submit(Batch("layer", TOKENS, gate_input=logits, **{**REQUESTS, **changes}))

    def kill(self, host: int, *, is_death: bool = True) -> list[BatchResult]:
        self.transport.sent = [each for each in self.transport.sent if each[0] != endpoint(host)]
        self.transport.arrivals.append(HostLost(endpoint(host), "its process ended", is_death=is_death))
        return self.engine.poll(0.0)

    def begin(self, host: int) -> None:
        """Let a host say that it has begun with what it has."""
        for where, request in self.transport.sent:
            if where == endpoint(host):
                self.transport.arrivals.append(HostReply(request.ticket, (), None, is_begun=True))
        assert self.engine.poll(0.0) == []

    def answer_next(self) -> list[BatchResult]:
        self.transport.answer(self.transport.sent.pop(0)[1])
        return self.engine.poll(0.0)

    @property
    def under_way(self) -> list[tuple[int, tuple[str, ...], list[float]]]:
        """Host, requests and first elements of the rows of each message."""
        return [(where.incarnation, r.request_ids, r.rows[:, 0].tolist()) for where, r in self.transport.sent]


def poisoned(result: BatchResult) -> list[int]:
    assert all(isinstance(error, PoisonedRequestError) for error in result.errors.values())
    return [*result.errors]


def test_the_requests_of_a_dead_hosts_message_are_tried_one_by_one() -> None:
    router = Router(make_layer(1), twins(2))
    router.submit(torch.zeros(3, 1))
    assert router.under_way == [(10, ("a", "b", "c"), [1.0, 4.0, 7.0])]
    assert router.kill(10) == []
    assert router.under_way == [(11, ("a",), [1.0])]
    assert router.answer_next() == []
    assert router.under_way == [(11, ("b",), [4.0])]
    assert router.answer_next() == []
    assert router.under_way == [(11, ("c",), [7.0])]
    (result,) = router.answer_next()
    assert torch.equal(result.outputs, 2 * TOKENS)
    assert result.errors == {}


def test_a_request_of_which_two_hosts_died_fails_and_its_batch_mates_do_not() -> None:
    router = Router(make_layer(1), twins(3))
    router.submit(torch.zeros(3, 1))
    router.kill(10)
    assert [(ids, rows) for _, ids, rows in router.under_way] == [(("a",), [1.0]), (("b",), [4.0])]
    first, _ = (host for host, _, _ in router.under_way)
    router.begin(first)
    router.kill(first)
    results = []
    while router.transport.sent:
        results = router.answer_next()
    (result,) = results
    assert poisoned(result) == [0]
    assert "request a" in str(result.errors[0])
    assert torch.equal(result.outputs[1:], 2 * TOKENS[1:])
    assert router.engine.stats.num_poisoned == 1


def test_those_that_wait_for_their_turn_are_no_suspects_of_the_second_death() -> None:
    router = Router(make_layer(1, residual="passthrough"), twins(2))
    router.submit(torch.zeros(3, 1))
    router.kill(10)
    router.begin(11)
    (result,) = router.kill(11)
    assert poisoned(result) == [0]
    assert torch.equal(result.outputs, TOKENS)
    assert not result.served.any()


def test_a_poisoned_request_is_not_rerouted_and_its_other_rows_are_not_sent_again() -> None:
    # Request a has rows at experts 0 and 1; both are on host 10 and, alone, go to hosts 12 and 13.
    router = Router(make_layer(4, k=1), table_of(1, 10, 10, 12, 13))
    logits = torch.tensor([[9.0, 0, 8, 0], [0.0, 9, 0, 8], [0.0, 0, 9, 0]])
    router.submit(logits, row_starts=(0, 2), request_ids=("a", "c"))
    router.kill(10)
    assert [(host, ids) for host, ids, _ in router.under_way] == [(12, ("a", "c")), (12, ("a",))]
    router.begin(12)
    assert router.kill(12) == []
    assert router.under_way == [(13, ("c",), [7.0])]
    (result,) = router.answer_next()
    assert poisoned(result) == [0]
    assert result.served.tolist() == [False, False, True]


def test_a_host_that_was_only_cut_off_puts_nobody_under_suspicion() -> None:
    router = Router(make_layer(1), twins(2))
    router.submit(torch.zeros(3, 1))
    router.kill(10, is_death=False)
    assert router.under_way == [(11, ("a", "b", "c"), [1.0, 4.0, 7.0])]
    (result,) = router.answer_next()
    assert result.errors == {}


def test_a_request_that_travels_alone_is_only_at_one_host_at_a_time() -> None:
    router = Router(make_layer(3), table_of(1, 10, 11, 12))
    router.submit(torch.tensor([[9.0, 8, 0], [9.0, 0, 8], [9.0, 8, 0]]), row_starts=(0,), request_ids=("a",))
    router.kill(10)
    assert router.under_way == [(11, ("a",), [1.0, 7.0])]
    assert router.answer_next() == []
    assert router.under_way == [(12, ("a",), [4.0])]
    (result,) = router.answer_next()
    assert result.served.all()


def test_a_host_that_hangs_on_a_request_alone_gets_no_other_until_it_answers() -> None:
    router = Router(make_layer(1, residual="passthrough"), twins(2))
    router.submit(torch.zeros(3, 1))
    router.kill(10)
    ((_, hung),) = router.transport.sent
    router.clock.advance(2.0)
    (result,) = router.engine.poll(0.0)
    assert (result.errors, result.served.any().item()) == ({}, False)
    assert router.under_way == [(11, ("a",), [1.0])]
    router.transport.answer(hung)
    assert router.engine.poll(0.0) == []
    router.engine.set_table(RoutingTable(2, {("layer", 0): (replica(0, 11, n=1),)}))
    router.submit(torch.zeros(3, 1))
    assert router.under_way[1:] == [(11, ("a", "b", "c"), [1.0, 4.0, 7.0])]


def test_a_death_of_a_message_without_requests_names_the_batch() -> None:
    router = Router(make_layer(1), twins(2))
    router.submit(torch.zeros(3, 1), row_starts=(0,), request_ids=())
    router.kill(10)
    router.begin(11)
    (result,) = router.kill(11)
    assert poisoned(result) == [0]
    assert f"batch {result.batch_id}" in str(result.errors[0])


def test_a_request_alone_that_its_dead_host_had_not_begun_with_is_tried_again_and_served() -> None:
    router = Router(make_layer(1), twins(3))
    router.submit(torch.zeros(3, 1), row_starts=(0,), request_ids=("a",))
    router.kill(10)
    ((second, _, _),) = router.under_way
    assert router.transport.sent[0][1].is_suspect
    assert router.kill(second) == []
    ((third, ids, _),) = router.under_way
    assert (third, ids) == (23 - second, ("a",))
    router.begin(third)
    (result,) = router.answer_next()
    assert (result.errors, router.engine.stats.num_poisoned) == ({}, 0)
    assert torch.equal(result.outputs, 2 * TOKENS)


def test_a_request_whose_hosts_die_three_times_without_a_word_is_not_believed_any_more() -> None:
    router = Router(make_layer(1), twins(5))
    router.submit(torch.zeros(3, 1), row_starts=(0,), request_ids=("a",))
    for _ in range(3):
        ((host, _, _),) = router.under_way
        assert router.kill(host) == []
    ((host, _, _),) = router.under_way
    (result,) = router.kill(host)
    assert poisoned(result) == [0]


def test_only_what_travels_alone_is_told_of_when_it_begins() -> None:
    router = Router(make_layer(1), twins(2))
    router.submit(torch.zeros(3, 1))
    assert not router.transport.sent[0][1].is_suspect
    router.kill(10)
    assert router.transport.sent[0][1].is_suspect
