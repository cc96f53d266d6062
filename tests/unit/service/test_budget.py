"""What the queue refuses, and when it says to come back."""

from __future__ import annotations

import pytest

from fakes.service import FakeClock
from moe_runtime.config.runtime import RouterConfig
from moe_runtime.errors import OverloadedError
from moe_runtime.service.budget import Place, QueueBudget
from moe_runtime.service.queue_stats import QueueStats


class Setting:
    """A budget with its fakes; places are of one layer and 10 bytes per token."""

    def __init__(self, **router: object) -> None:
        self.clock = FakeClock()
        self.stats = QueueStats()
        limits = {"max_queued_tokens": 100, "max_queued_bytes": 10_000, "max_batch_tokens": 8, **router}
        self.budget = QueueBudget(RouterConfig(**limits), clock=self.clock, stats=self.stats)

    def reserve(self, num_tokens: int, *, client: str = "", num_bytes: int | None = None, left_s: float = 60.0) -> None:
        num_bytes = 10 * num_tokens if num_bytes is None else num_bytes
        self.budget.reserve(Place("layer", client, num_tokens, num_bytes), time_left_s=left_s)

    def send(self, num_tokens: int, *, client: str = "") -> None:
        self.budget.send(Place("layer", client, num_tokens, 10 * num_tokens))

    def measure(self, tokens_per_s: float, *, batch_s: float = 0.1) -> None:
        """Let the layer show its pace."""
        self.clock.advance(batch_s)
        now = self.clock.now()
        self.budget.pace("layer").batch_answered(
            round(tokens_per_s * batch_s), joined_at=now - batch_s, now=now, left_rows_waiting=True
        )

    def refused(self) -> dict[str, int]:
        return {reason: count for reason, count in self.stats.snapshot()["refused"].items() if count}


def test_full_queue_refuses_by_tokens_and_by_bytes() -> None:
    setting = Setting(max_queued_tokens=10, max_queued_bytes=1000)
    setting.reserve(8, num_bytes=10)
    with pytest.raises(OverloadedError, match="8 tokens wait, 3 more would exceed 10") as refused:
        setting.reserve(3, num_bytes=10)
    assert refused.value.retry_after_ms == 100.0
    with pytest.raises(OverloadedError, match="10 bytes wait, 991 more would exceed 1000"):
        setting.reserve(1, num_bytes=991)
    assert setting.refused() == {"tokens": 1, "bytes": 1}


def test_hint_follows_the_pace_of_late_not_that_since_the_start() -> None:
    setting = Setting(max_queued_tokens=10, max_queued_s=60.0)
    setting.reserve(8)
    setting.clock.advance(3600.0)
    setting.measure(40.0)
    # Half of the 8 tokens that wait, and 3 of its own, at 40 per second.
    with pytest.raises(OverloadedError, match="try again in 175 ms") as refused:
        setting.reserve(3)
    assert refused.value.retry_after_ms == pytest.approx(175.0)


def test_callers_are_told_to_come_back_one_after_the_other_up_to_five_seconds() -> None:
    setting = Setting(max_queued_tokens=10, max_queued_s=60.0)
    setting.measure(10.0, batch_s=1.0)
    setting.reserve(10)
    hints = []
    for _ in range(6):
        with pytest.raises(OverloadedError) as refused:
            setting.reserve(10)
        hints.append(refused.value.retry_after_ms)
    assert hints == pytest.approx([1500, 2500, 3500, 4500, 5000, 5000])
    setting.clock.advance(10.0)
    with pytest.raises(OverloadedError) as refused:
        setting.reserve(10)
    assert refused.value.retry_after_ms == pytest.approx(1500)


def test_more_work_than_may_wait_is_refused_but_the_next_batch_may_always_be_filled() -> None:
    setting = Setting(max_queued_s=0.5)
    setting.measure(10.0, batch_s=0.8)
    setting.reserve(1)
    setting.reserve(6)
    # 7 tokens are 0.7 s of work, but fewer than a batch.
    setting.reserve(1)
    with pytest.raises(OverloadedError, match=r"0\.800 s of work wait before this request, more than 0\.5 s"):
        setting.reserve(1)
    assert setting.refused() == {"time": 1}


def test_request_whose_answer_would_be_late_is_refused_at_once_and_one_with_time_is_not() -> None:
    setting = Setting(max_queued_s=60.0)
    setting.measure(100.0, batch_s=0.1)
    setting.reserve(20)
    # Two batches of 10 before its own, and that with its wait for a slot: 0.2 + 0.15 s, which is 0.75 of 0.467 s.
    with pytest.raises(OverloadedError, match=r"the answer would take about 0\.350 s, and the deadline is in 0\.460 s"):
        setting.reserve(10, left_s=0.46)
    setting.reserve(10, left_s=0.47)


def test_nothing_is_refused_for_its_time_while_nothing_waits_however_slow_the_layer_was() -> None:
    setting = Setting()
    setting.measure(0.1, batch_s=10.0)
    setting.reserve(8, left_s=0.001)


def test_client_that_floods_may_hold_all_alone_and_its_share_once_another_asks() -> None:
    setting = Setting()
    setting.reserve(90, client="flood")
    setting.reserve(10, client="other")
    setting.send(60, client="flood")
    setting.reserve(20, client="flood")
    with pytest.raises(OverloadedError, match=r"the client holds 50 tokens of 100, and may hold 0\.5 of the queue"):
        setting.reserve(1, client="flood")
    setting.reserve(40, client="other")
    assert setting.refused() == {"client_share": 1}


def test_newcomer_does_not_wait_for_all_that_a_flooding_client_has_queued() -> None:
    setting = Setting(max_queued_s=0.5, max_client_share=1.0)
    setting.measure(100.0)
    setting.reserve(50, client="flood")
    with pytest.raises(OverloadedError, match="the answer would take"):
        setting.reserve(4, client="flood", left_s=0.5)
    # By turns, 4 tokens of the other's go before it.
    setting.reserve(4, client="small", left_s=0.5)


def test_client_is_told_of_the_part_of_the_pace_that_others_leave_it() -> None:
    setting = Setting(max_queued_s=60.0, max_client_share=1.0)
    setting.measure(100.0)
    setting.reserve(30, client="half")
    setting.reserve(40, client="flood")
    setting.send(30, client="half")
    setting.send(30, client="flood")
    # 10 tokens at half the pace, which are two batches, and its own: 0.2 + 0.15 s.
    with pytest.raises(OverloadedError, match=r"about 0\.350 s"):
        setting.reserve(10, client="flood", left_s=0.46)


def test_snapshot_says_what_waits_and_how_fast_it_goes() -> None:
    setting = Setting()
    setting.measure(100.0)
    setting.reserve(5, client="a")
    assert setting.budget.snapshot() == {
        "tokens": 5,
        "bytes": 50,
        "max_tokens": 100,
        "max_bytes": 10_000,
        "num_active_clients": 1,
        "tokens_per_s": {"layer": pytest.approx(100.0)},
    }
