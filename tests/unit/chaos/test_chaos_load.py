"""How late a loop ran is known for every moment of the last minute."""

from __future__ import annotations

import pytest

from moe_runtime.chaos.load import LagMeter


def test_lag_is_the_worst_since_a_moment():
    lag = LagMeter()
    for now, seconds in ((1.0, 0.3), (2.0, 0.01), (3.0, 0.05), (4.0, 0.02)):
        lag.add(now, seconds)
    assert lag.worst_s == 0.3
    assert lag.worst_since(0.0) == 0.3
    assert lag.worst_since(1.5) == 0.05
    assert lag.worst_since(4.0) == 0.02
    assert lag.worst_since(5.0) == 0.0


def test_a_meter_that_runs_for_long_keeps_the_last_minute():
    lag = LagMeter()
    for tick in range(30_000):
        lag.add(tick / 100, 1.0 if tick == 0 else 0.001)
    assert lag.worst_s == 1.0
    assert lag.worst_since(240.0) == pytest.approx(0.001)
    assert lag.worst_since(0.0) == pytest.approx(0.001)
