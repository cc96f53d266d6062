"""What both transports guarantee when all is well: the ports' contracts, run against each of them."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import torch

from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5, 2, 3), (300, 64)])
def test_rows_arrive_and_come_back_bit_for_bit(fabric, dtype, shape):
    router, host = fabric.router(), fabric.host()
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    request = HostRequest(2**63, (Segment("a", 0), Segment("b/1", shape[0])), rows, timeout_s=1.5)
    router.send(host.endpoint, request)
    (delivery,) = fabric.receive(host)
    assert delivery.request.ticket == 2**63
    assert delivery.request.segments == request.segments
    assert delivery.request.timeout_s == 1.5
    assert delivery.request.rows.dtype == dtype
    assert torch.equal(delivery.request.rows, rows)

    outputs = rows.flatten(1)[:, :1] * 2
    results = (SegmentResult("a", 0, "gone: größer", 0.0), SegmentResult("b/1", shape[0], None, 0.25))
    host.reply(delivery, HostReply(2**63, results, outputs))
    (reply,) = fabric.poll(router)
    assert reply.ticket == 2**63
    assert reply.results == results
    assert reply.rows.dtype == dtype
    assert torch.equal(reply.rows, outputs)


def test_allocated_rows_travel_like_any_others(fabric):
    router, host = fabric.router(), fabric.host()
    for ticket, shape in enumerate([(2, 3), (64, 1024), (64, 1024), (0, 5), (64, 1024)]):
        rows = router.allocate(host.endpoint, shape, torch.float32)
        assert rows.shape == shape
        rows.fill_(ticket)
        router.send(host.endpoint, fabric.make_request(ticket, rows))
        (delivery,) = fabric.receive(host)
        assert torch.equal(delivery.request.rows, torch.full(shape, float(ticket)))
        host.reply(delivery, fabric.make_reply(delivery, delivery.request.rows + 1))
        assert torch.equal(fabric.poll(router)[0].rows, torch.full(shape, ticket + 1.0))


def test_reply_without_good_rows_has_none(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    result = SegmentResult("layer/expert/0", 2, "it raised", 0.0)
    host.reply(delivery, HostReply(1, (result,), None))
    (reply,) = fabric.poll(router)
    assert reply == HostReply(1, (result,), None)


def test_rows_that_need_grad_or_are_strided_travel(fabric):
    router, host = fabric.router(), fabric.host()
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    router.send(host.endpoint, fabric.make_request(1, base.t()))
    (delivery,) = fabric.receive(host)
    assert torch.equal(delivery.request.rows, base.t())


def test_rows_made_in_inference_mode_come_back_usable_by_autograd(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    with torch.inference_mode():
        outputs = torch.full((2, 3), 3.0)
    host.reply(delivery, fabric.make_reply(delivery, outputs))
    (reply,) = fabric.poll(router)
    weight = torch.ones((), requires_grad=True)
    (reply.rows * weight).sum().backward()
    assert weight.grad == 18.0


def test_one_host_answers_each_of_many_routers_its_own(fabric):
    host = fabric.host()
    routers = [fabric.router() for _ in range(4)]
    for index, router in enumerate(routers):
        router.send(host.endpoint, fabric.make_request(7, torch.full((1, 2), float(index))))
    for delivery in fabric.receive(host, 4):
        host.reply(delivery, fabric.make_reply(delivery, delivery.request.rows + 10))
    for index, router in enumerate(routers):
        (reply,) = fabric.poll(router)
        assert reply.ticket == 7
        assert torch.equal(reply.rows, torch.full((1, 2), index + 10.0))


def test_one_router_hears_from_many_hosts(fabric):
    router = fabric.router()
    hosts = [fabric.host() for _ in range(4)]
    for ticket, host in enumerate(hosts):
        router.send(host.endpoint, fabric.make_request(ticket))
    for host in hosts:
        (delivery,) = fabric.receive(host)
        host.reply(delivery, fabric.make_reply(delivery))
    assert {reply.ticket for reply in fabric.poll(router, 4)} == {0, 1, 2, 3}


def test_replies_may_come_in_any_order(fabric):
    router, host = fabric.router(), fabric.host()
    for ticket in (1, 2, 3):
        router.send(host.endpoint, fabric.make_request(ticket))
    for delivery in reversed(fabric.receive(host, 3)):
        host.reply(delivery, fabric.make_reply(delivery))
    assert [reply.ticket for reply in fabric.poll(router, 3)] == [3, 2, 1]


def test_a_note_that_a_suspect_is_begun_comes_before_its_answer(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, msgspec.structs.replace(fabric.make_request(1), is_suspect=True))
    (delivery,) = fabric.receive(host)
    assert delivery.request.is_suspect
    host.reply(delivery, HostReply(1, (), None, is_begun=True))
    assert fabric.poll(router) == [HostReply(1, (), None, is_begun=True)]
    host.reply(delivery, fabric.make_reply(delivery))
    (reply,) = fabric.poll(router)
    assert (reply.ticket, reply.is_begun) == (1, False)


def test_a_note_about_a_request_that_is_answered_already_is_dropped(fabric):
    router, host = fabric.router(), fabric.host()
    router.send(host.endpoint, fabric.make_request(1))
    (delivery,) = fabric.receive(host)
    for reply in (fabric.make_reply(delivery), HostReply(1, (), None, is_begun=True)):
        host.reply(delivery, reply)
    router.send(host.endpoint, fabric.make_request(2))
    (delivery,) = fabric.receive(host)
    host.reply(delivery, fabric.make_reply(delivery))
    assert [(reply.ticket, reply.is_begun) for reply in fabric.poll(router, 2)] == [(1, False), (2, False)]


@pytest.mark.parametrize("end", ["router", "host"])
def test_wake_before_a_wait_makes_it_return_at_once(fabric, end):
    transport = getattr(fabric, end)()
    wait = transport.poll if end == "router" else transport.receive
    transport.wake()
    transport.wake()
    started = time.monotonic()
    assert wait(fabric.deadline_s) == []
    assert time.monotonic() - started < fabric.deadline_s / 2
    assert wait(0.0) == []


@pytest.mark.parametrize("end", ["router", "host"])
def test_wake_from_another_thread_ends_a_wait(fabric, end):
    transport = getattr(fabric, end)()
    wait = transport.poll if end == "router" else transport.receive
    timer = threading.Timer(0.05, transport.wake)
    timer.start()
    started = time.monotonic()
    assert wait(fabric.deadline_s) == []
    timer.join()
    assert time.monotonic() - started < fabric.deadline_s / 2


def test_waits_end_when_their_time_is_up(fabric):
    assert fabric.router().poll(0.001) == []
    assert fabric.host().receive(0.001) == []


def test_requests_from_many_threads_are_answered_once_each(fabric):
    host = fabric.host()
    stopping = threading.Event()

    def serve():
        while not stopping.is_set():
            for delivery in host.receive(fabric.deadline_s):
                host.reply(delivery, fabric.make_reply(delivery, delivery.request.rows * 2))

    def call(router, base):
        for ticket in range(base, base + 50):
            router.send(host.endpoint, fabric.make_request(ticket, torch.full((1, 1), float(ticket))))
            (reply,) = fabric.poll(router)
            answered.append((ticket, reply.ticket, reply.rows.item()))

    answered = []
    server = threading.Thread(target=serve)
    server.start()
    callers = [threading.Thread(target=call, args=(fabric.router(), base)) for base in (0, 1000, 2000)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(fabric.deadline_s)
    stopping.set()
    host.wake()
    server.join(fabric.deadline_s)
    assert sorted(answered) == [(t, t, t * 2.0) for base in (0, 1000, 2000) for t in range(base, base + 50)]
