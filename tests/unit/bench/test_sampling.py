from __future__ import annotations

import pytest

from moe_runtime.bench.sampling import Contender, Effort, Sample, interleave, rounds, time_calls


def recorder(name: str, log: list[str], seconds: float) -> Contender:
    def time_calls(num_calls: int) -> list[float]:
        log.append(name)
        return [seconds] * num_calls

    return Contender(name, time_calls)


def test_contenders_take_turns_and_the_order_is_reversed_from_round_to_round():
    log: list[str] = []
    contenders = [recorder("ours", log, 0.1), recorder("peer", log, 0.1)]
    interleave(contenders, effort=Effort(seconds=0.0, min_rounds=2), now=lambda: 0.0)
    warm_up, measured = log[:4], log[4:]
    assert warm_up == ["ours", "ours", "peer", "peer"]
    assert measured == ["ours", "peer", "peer", "ours"]


def test_rounds_go_on_until_the_time_is_used():
    ticks = iter(range(100))
    log: list[str] = []
    contenders = [recorder("ours", log, 0.1)]
    samples = interleave(contenders, effort=Effort(seconds=4.0, min_rounds=1), now=lambda: float(next(ticks)))
    assert len(samples["ours"].times_ms) == 4


def test_a_fast_contender_makes_more_calls_per_turn_than_a_slow_one():
    contenders = [recorder("fast", [], 0.001), recorder("slow", [], 0.1)]
    samples = interleave(contenders, effort=Effort(seconds=0.0, min_rounds=1), now=lambda: 0.0)
    assert len(samples["fast"].times_ms) == 20
    assert len(samples["slow"].times_ms) == 1


def test_a_sample_has_the_median_and_the_quartiles_in_milliseconds():
    sample = Sample.of([0.004, 0.001, 0.003, 0.002])
    assert sample.median_ms == pytest.approx(2.5)
    assert sample.spread_ms == pytest.approx((1.0, 3.0))
    assert sample.quantile(0.99) == pytest.approx(4.0)


def test_each_call_is_timed():
    calls: list[int] = []
    times = time_calls(lambda: calls.append(1), 3)
    assert len(calls) == len(times) == 3
    assert all(seconds >= 0 for seconds in times)


def test_rounds_end_early_once_every_contender_has_made_enough_calls():
    contenders = [recorder("fast", [], 0.001), recorder("slow", [], 0.1)]
    samples = interleave(contenders, effort=Effort(seconds=1e9, min_rounds=1, max_calls=3), now=lambda: 0.0)
    assert len(samples["slow"].times_ms) == 3


def test_the_minimum_of_rounds_is_made_even_if_there_are_calls_enough_and_the_time_is_up():
    ticks = iter(range(100))
    effort = Effort(seconds=0.0, min_rounds=3, max_calls=0)
    assert list(rounds(effort, num_calls=lambda: 10, now=lambda: float(next(ticks)))) == [0, 1, 2]
