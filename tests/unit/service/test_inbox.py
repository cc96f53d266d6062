"""What callers' threads hand to the service's thread, and when that is woken."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fakes.service import FakeClock
from moe_runtime.errors import OverloadedError, UnavailableError
from moe_runtime.service.inbox import Inbox
from moe_runtime.service.queue_stats import QueueStats
from moe_runtime.service.shares import ClientShares


def make_inbox(wake: Callable[[], None], max_open_requests: int, *, clock: FakeClock, stats: QueueStats) -> Inbox:
    return Inbox(
        wake,
        max_open_requests=max_open_requests,
        shares=ClientShares(share=0.5, clock=clock),
        stats=stats,
    )


class Setting:
    """An inbox that notes its wake-ups, and what was done."""

    def __init__(self, *, max_open_requests: int = 2) -> None:
        self.num_wakes = 0
        self.done: list[str] = []
        self.clock = FakeClock()
        self.stats = QueueStats()
        self.inbox = make_inbox(self._wake, max_open_requests, clock=self.clock, stats=self.stats)

    def post(self, name: str) -> None:
        self.inbox.post(lambda: self.done.append(name))

    def take_in(self, name: str = "request", client: str = "") -> None:
        self.inbox.take_in(lambda: self.done.append(name), client=client, reserve=lambda: None, hint_ms=lambda: 20.0)

    def _wake(self) -> None:
        self.num_wakes += 1


def test_actions_that_come_together_wake_the_service_once_and_are_done_in_order() -> None:
    setting = Setting()
    for name in ("a", "b", "c"):
        setting.post(name)
    assert setting.num_wakes == 1
    setting.inbox.run_all()
    assert setting.done == ["a", "b", "c"]
    setting.post("d")
    assert setting.num_wakes == 2


def test_an_action_that_comes_while_others_are_done_is_done_with_them_and_wakes_again() -> None:
    setting = Setting()
    setting.inbox.post(lambda: setting.post("inner"))
    setting.inbox.run_all()
    assert setting.done == ["inner"]
    assert setting.num_wakes == 2


def test_no_action_is_left_without_a_wake_up_when_many_threads_post() -> None:
    woken = threading.Semaphore(0)
    inbox = make_inbox(woken.release, 1, clock=FakeClock(), stats=QueueStats())
    num_threads, num_each, done = 4, 500, []

    def post() -> None:
        for number in range(num_each):
            inbox.post(lambda number=number: done.append(number))

    threads = [threading.Thread(target=post) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    while len(done) < num_threads * num_each:
        assert woken.acquire(timeout=20.0), f"{len(done)} actions done, then no wake-up for the others"
        inbox.run_all()
    for thread in threads:
        thread.join()


def test_more_open_requests_than_the_limit_are_refused_until_one_is_answered() -> None:
    setting = Setting(max_open_requests=1)
    setting.take_in()
    with pytest.raises(OverloadedError, match="the router holds 1 requests"):
        setting.take_in()
    setting.inbox.answered("")
    setting.take_in()
    assert setting.inbox.num_open == 1


def test_a_client_may_have_its_share_of_the_open_requests_while_another_asks() -> None:
    setting = Setting(max_open_requests=4)
    for _ in range(4):
        setting.take_in(client="flood")
    with pytest.raises(OverloadedError, match="holds 4 requests") as refused:
        setting.take_in(client="other")
    assert refused.value.retry_after_ms == 20.0
    setting.inbox.answered("flood")
    with pytest.raises(OverloadedError, match="the client has 3 requests open of the 4"):
        setting.take_in(client="flood")
    setting.take_in(client="other")
    assert setting.stats.snapshot()["refused"]["open_requests"] == 1
    assert setting.stats.snapshot()["refused"]["client_share"] == 1


def test_a_request_that_finds_no_place_in_the_queue_is_not_open() -> None:
    setting = Setting()

    def refuse() -> None:
        raise OverloadedError("the queue is full", retry_after_ms=1.0)

    with pytest.raises(OverloadedError, match="the queue is full"):
        setting.inbox.take_in(lambda: None, client="", reserve=refuse, hint_ms=lambda: 20.0)
    assert (setting.inbox.num_open, setting.num_wakes) == (0, 0)


def test_a_closed_inbox_refuses_requests_but_still_takes_actions() -> None:
    setting = Setting()
    setting.take_in("request")
    setting.inbox.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        setting.take_in()
    setting.post("cancel")
    setting.inbox.run_all()
    assert setting.done == ["request", "cancel"]
    assert not setting.inbox.wait_until_empty(0.0)
    setting.inbox.answered("")
    assert setting.inbox.wait_until_empty(0.0)


def test_at_the_end_an_action_that_raises_does_not_keep_the_others_from_being_done() -> None:
    setting = Setting()

    def fail() -> None:
        raise RuntimeError("broken")

    setting.inbox.post(fail)
    setting.post("after")
    setting.inbox.run_rest()
    assert setting.done == ["after"]
