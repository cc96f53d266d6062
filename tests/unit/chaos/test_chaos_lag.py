"""For how long a thread did not run is known for every moment of the last minute."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from moe_runtime.chaos.lag import Lag, LagMeter


def meter() -> LagMeter:
    """Ran at 1.0 s, then not before 1.31 s, then at 1.32 s, then not before 1.38 s."""
    lag = LagMeter(now=1.0)
    for now, seconds in ((1.31, 0.3), (1.32, 0.0), (1.38, 0.05)):
        lag.add(now, seconds)
    return lag


def test_lag_is_the_time_for_which_nothing_ran_in_all():
    assert meter().worst_s == 0.3
    assert meter().since(1.0, 1.38) == pytest.approx(0.35)
    assert meter().since(1.315, 1.38) == pytest.approx(0.05)


def test_of_a_lag_only_what_is_after_the_moment_counts():
    assert meter().since(1.21, 1.38) == pytest.approx(0.15)


def test_a_lag_that_is_not_over_counts_too():
    assert meter().since(1.38, 1.385) == 0.0
    assert meter().since(1.38, 1.49) == pytest.approx(0.1)
    assert meter().since(1.45, 1.49) == pytest.approx(0.04)


def test_a_moment_to_come_has_no_lag():
    assert meter().since(9.0, 1.38) == 0.0


def test_a_meter_that_runs_for_long_keeps_the_last_minute():
    lag = LagMeter(now=0.0)
    for tick in range(1, 60_001):
        lag.add(tick / 100, 1.0 if tick == 1 else 0.0)
    assert lag.worst_s == 1.0
    assert lag.since(530.0, 600.0) == 0.0


async def test_a_loop_that_is_held_up_lags_and_its_thread_ends_with_it():
    lag = Lag()
    measuring = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    assert any(thread.name == "chaos-lag" for thread in threading.enumerate())
    began_at = time.monotonic()
    while time.monotonic() < began_at + 0.1:
        pass
    assert lag.since(began_at, time.monotonic()) >= 0.08
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)
    assert not any(thread.name == "chaos-lag" for thread in threading.enumerate())
