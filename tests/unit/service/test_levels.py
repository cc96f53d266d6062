"""Layers within layers: what waits on one level of nesting holds nothing up that it is waiting for itself."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fakes.service import FakeClock
from moe_runtime.config.runtime import RouterConfig
from moe_runtime.errors import OverloadedError, UnavailableError
from moe_runtime.service.budget import Place, QueueBudget
from moe_runtime.service.inbox import Inbox
from moe_runtime.service.queue_stats import QueueStats
from moe_runtime.service.shares import ClientShares


class Setting:
    """A budget of 10 tokens, and an inbox of 2 open requests."""

    def __init__(self) -> None:
        clock = FakeClock()
        router, stats = RouterConfig(max_queued_tokens=10), QueueStats()
        self.budget = QueueBudget(router, clock=clock, stats=stats)
        self.inbox = Inbox(lambda: None, max_open_requests=2, shares=ClientShares(share=0.5, clock=clock), stats=stats)

    def reserve(self, num_tokens: int, *, level: int, client: str = "") -> None:
        self.budget.reserve(Place(f"layer-{level}", client, num_tokens, num_tokens, level), time_left_s=60.0)

    def take_in(self, *, level: int, client: str = "") -> None:
        self.inbox.take_in(lambda: None, client=client, reserve=lambda: None, hint_ms=lambda: 1.0, level=level)


def test_a_queue_full_of_outer_requests_has_room_for_an_inner_one() -> None:
    setting = Setting()
    setting.reserve(10, level=0)
    setting.reserve(10, level=1)
    for level in (0, 1):
        with pytest.raises(OverloadedError, match="10 tokens wait, 1 more would exceed 10"):
            setting.reserve(1, level=level)
    assert setting.budget.num_tokens == 20


def test_a_place_is_given_back_on_its_own_level() -> None:
    setting = Setting()
    setting.reserve(10, level=0)
    setting.reserve(4, level=1)
    setting.budget.release(Place("layer-1", "", 4, 4, 1))
    setting.reserve(10, level=1)
    with pytest.raises(OverloadedError):
        setting.reserve(1, level=0)


def test_an_outer_client_does_not_use_up_its_share_by_what_it_makes_experts_ask() -> None:
    setting = Setting()
    setting.reserve(5, level=0, client="a")
    setting.reserve(5, level=1, client="a")
    setting.reserve(1, level=1, client="b")
    setting.reserve(5, level=0, client="a")


def test_a_smaller_share_counts_on_every_level_from_then_on() -> None:
    setting = Setting()
    setting.reserve(2, level=1, client="a")
    setting.reserve(1, level=1, client="b")
    setting.budget.resize(RouterConfig(max_queued_tokens=10, max_client_share=0.2))
    with pytest.raises(OverloadedError, match=r"the client holds 2 tokens of 10, and may hold 0\.2"):
        setting.reserve(1, level=1, client="a")


def test_open_requests_are_counted_per_level() -> None:
    setting = Setting()
    setting.take_in(level=0)
    setting.take_in(level=0)
    with pytest.raises(OverloadedError, match="the router holds 2 requests"):
        setting.take_in(level=0)
    setting.take_in(level=1)
    assert setting.inbox.num_open == 3
    setting.inbox.answered("", 0)
    setting.take_in(level=0)


def test_open_requests_are_counted_while_the_first_of_other_levels_come_in() -> None:
    setting, interval_s = Setting(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(lambda: [setting.take_in(level=level) for level in range(500)])
            while not taking.done():
                assert 0 <= setting.inbox.num_open <= 500
            taking.result()
    finally:
        sys.setswitchinterval(interval_s)
    assert setting.inbox.num_open == 500


def test_while_draining_what_an_open_request_may_wait_for_is_taken_in() -> None:
    setting = Setting()
    setting.take_in(level=0)
    setting.inbox.close()
    setting.take_in(level=2)
    with pytest.raises(UnavailableError):
        setting.take_in(level=0)
    setting.inbox.answered("", 0)
    # That of level 2 may still wait for more of level 3, and for nothing of its own level.
    setting.take_in(level=3)
    with pytest.raises(UnavailableError):
        setting.take_in(level=2)
    setting.inbox.answered("", 2)
    setting.inbox.answered("", 3)
    assert setting.inbox.wait_until_empty(0.0)


def test_once_shut_nothing_is_taken_in() -> None:
    setting = Setting()
    setting.take_in(level=0)
    setting.inbox.shut()
    with pytest.raises(UnavailableError):
        setting.take_in(level=1)
