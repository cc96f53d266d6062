"""Outcomes cross from the engine's thread to the event loop: all of them, with one wake-up per batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_runtime.errors import UnavailableError
from moe_runtime.rpc.pending import Answers, PendingAnswer
from moe_runtime.service.pending import Ticket
from moe_runtime.service.report import empty_report
from moe_runtime.service.requests import LayerAnswer, LayerRequest


class Service:
    """Keeps what it was given, and answers when the test says so."""

    def __init__(self) -> None:
        self.on_done: list[Callable[[Any], None]] = []
        self.cancelled: list[int] = []

    def submit(self, request: LayerRequest, on_done: Callable[[Any], None]) -> Ticket:
        self.on_done.append(on_done)
        return Ticket(len(self.on_done))

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket.request_key)


def request() -> LayerRequest:
    return LayerRequest("request", "layer", torch.zeros(0, 3))


def answer() -> LayerAnswer:
    return LayerAnswer(torch.zeros(0, 3), empty_report(request(), table_version=1, warnings=()))


def submitted(service: Service, num_requests: int) -> list[PendingAnswer]:
    answers = Answers()
    pending = [PendingAnswer(service, answers) for _ in range(num_requests)]  # type: ignore[arg-type]  # a fake
    for each in pending:
        each.submit(request())
    return pending


async def test_answers_of_one_batch_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, wakes = asyncio.get_running_loop(), []
    call_soon = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (wakes.append(call), call_soon(*call)))
    service = Service()
    pending = submitted(service, 3)
    expected = [answer() for _ in pending]
    for on_done, outcome in zip(service.on_done, expected, strict=True):
        on_done(outcome)
    assert len(wakes) == 1
    assert [await each.wait() for each in pending] == expected


async def test_every_answer_arrives_when_they_trickle_in_from_another_thread() -> None:
    service = Service()
    pending = submitted(service, 500)
    expected = [answer() for _ in pending]

    def settle() -> None:
        for on_done, outcome in zip(service.on_done, expected, strict=True):
            on_done(outcome)

    settling = asyncio.create_task(asyncio.to_thread(settle))
    async with asyncio.timeout(20.0):
        got = [await each.wait() for each in pending]
    await settling
    assert all(one is other for one, other in zip(got, expected, strict=True))


async def test_an_answer_that_comes_after_its_call_ended_does_not_disturb_the_others() -> None:
    service = Service()
    first, second = submitted(service, 2)
    first.withdraw()
    service.on_done[0](answer())
    service.on_done[1](UnavailableError("closed"))
    with pytest.raises(UnavailableError, match="closed"):
        await second.wait()
    assert service.cancelled == [1]
