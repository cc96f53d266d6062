"""More than the experts can do: what they can do is still answered in time, and nobody waits for what nobody gets."""

from __future__ import annotations

import pytest

from fakes.overload import Arrival, QueueAndHost


def steady(
    setting: QueueAndHost, *, times: float, timeout_s: float, client: str = "", from_s: float = 0.0, to_s: float = 3.0
) -> list[Arrival]:
    """Requests of 8 tokens, at so many times what the host can do."""
    gap_s = 8 / (setting.capacity * times)
    return [Arrival(from_s + i * gap_s, 8, timeout_s, client) for i in range(int((to_s - from_s) / gap_s))]


@pytest.mark.parametrize("timeout_s", [0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize(("batch_s", "token_s"), [(0.01, 0.0), (0.002, 0.0001)])
def test_three_times_the_capacity_leaves_the_capacity_and_ends_within_a_second(
    timeout_s: float, batch_s: float, token_s: float
) -> None:
    setting = QueueAndHost(batch_s=batch_s, token_s=token_s)
    load = steady(setting, times=3.0, timeout_s=timeout_s)
    setting.run([*load, Arrival(4.0, 8, timeout_s)])
    outcome = setting.outcomes[""]
    assert 8 * (outcome.in_time - 1) / 3.0 >= 0.95 * setting.capacity
    assert outcome.in_time + outcome.late + outcome.refused == len(load) + 1
    assert outcome.late <= 0.01 * len(load)
    # A lone request's time, one second after the load.
    assert outcome.latencies[-1] == (4.0, pytest.approx(batch_s + 8 * token_s))
    assert setting.most_queued_tokens <= setting.capacity * 0.5 + 64 + 8
    assert setting.door.load()["tokens"] == 0


def test_callers_that_come_back_when_they_are_told_get_the_capacity_with_few_refusals() -> None:
    setting = QueueAndHost(batch_s=0.1, token_s=0.0, max_batch_tokens=100)
    setting.run([Arrival(0.0, 25, 1.0, repeats_until=10.0) for _ in range(256)])
    outcome = setting.outcomes[""]
    assert outcome.tokens_in_time / 10.0 >= 0.9 * setting.capacity
    # Most expire who came before anybody knew the pace; then each is refused about once per 25 tokens of the capacity.
    assert outcome.late <= 256
    assert outcome.refused <= 3 * outcome.in_time


def test_load_within_the_capacity_is_never_refused() -> None:
    setting = QueueAndHost(batch_s=0.01, token_s=0.0)
    load = steady(setting, times=0.9, timeout_s=1.0)
    setting.run(load)
    assert setting.outcomes[""].in_time == len(load)


def test_burst_that_the_queue_can_hold_is_answered_whole() -> None:
    setting = QueueAndHost(batch_s=0.01, token_s=0.0)
    setting.run([Arrival(0.0, 8, 2.0) for _ in range(400)])
    assert setting.outcomes[""].in_time == 400


def test_flooding_client_does_not_starve_another() -> None:
    setting = QueueAndHost(batch_s=0.01, token_s=0.0)
    flood = steady(setting, times=3.0, timeout_s=0.3, client="flood")
    modest = steady(setting, times=0.3, timeout_s=0.3, client="modest")
    setting.run(flood + modest)
    assert setting.outcomes["modest"].in_time == len(modest)
    assert max(latency for _, latency in setting.outcomes["modest"].latencies) < 0.05
    # What the modest one leaves goes to the other, and little of it is computed for nothing.
    assert setting.outcomes["flood"].tokens_in_time / 3.0 >= 0.65 * setting.capacity
    assert setting.outcomes["flood"].late <= 0.01 * len(flood)


def test_two_flooding_clients_share_evenly_and_lose_nothing_of_the_capacity() -> None:
    setting = QueueAndHost(batch_s=0.01, token_s=0.0)
    setting.run(
        steady(setting, times=4.0, timeout_s=0.3, client="a") + steady(setting, times=2.0, timeout_s=0.3, client="b")
    )
    a, b = (setting.outcomes[client].tokens_in_time / 3.0 / setting.capacity for client in "ab")
    assert a + b >= 0.8
    assert a == pytest.approx(b, abs=0.1)


def test_expired_requests_are_never_computed_when_the_host_stalls() -> None:
    setting = QueueAndHost(batch_s=5.0, token_s=0.0)
    setting.run([Arrival(0.001 * i, 8, 0.5) for i in range(100)])
    stats = setting.door.stats.snapshot()
    # Two batches were under way: the first request, and the two that came within the next 2 ms.
    assert stats["num_expired_before_compute"] == 97
    assert stats["num_rows_freed"] == 97 * 8


def test_queue_recovers_from_a_stall_that_made_the_layer_look_slow() -> None:
    setting = QueueAndHost(batch_s=0.1, token_s=0.0, max_batch_tokens=100)
    pace = setting.door.budget.pace("layer")
    pace.batch_answered(100, joined_at=-5.0, now=0.0, left_rows_waiting=True)
    assert pace.tokens_per_s == 20.0
    setting.run([Arrival(0.008 * i, 25, 1.0) for i in range(1000)])
    late = [at for at, _ in setting.outcomes[""].latencies if at >= 4.0]
    assert 25 * len(late) / 4.0 >= 0.9 * setting.capacity
