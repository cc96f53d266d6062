"""What a sequence of pings means for a host, without a host."""

from __future__ import annotations

import pytest

from moe_runtime.ray_backend.health_watch import Drain, Finding, HealthRules, HealthWatch, Silence
from moe_runtime.ray_backend.pace import Pace
from moe_runtime.ray_backend.plan import HostHealth

PACE = Pace(max_suspect_s=3.0, hang_factor=3.0, min_hang_s=5.0, num_clean_pings=2, num_faulty_pings=3)


def judge(health, *, max_forward_s=2.0, max_rss_bytes=100 << 20):
    return HealthWatch(PACE).answer(health, HealthRules(PACE, max_forward_s, max_rss_bytes))


def findings(fault_counts):
    """The findings of pings that report so many faults of one replica so far."""
    watch = HealthWatch(PACE)
    rules = HealthRules(PACE)
    return [str(watch.answer(HostHealth(num_faults={"l/a/0": n}), rules).finding) for n in fault_counts]


def test_a_host_that_has_not_started_is_fit():
    assert judge(None).finding is Finding.FIT


def test_a_healthy_host_is_fit():
    verdict = judge(HostHealth(busy_s=2.0, rss_bytes=100 << 20))
    assert (verdict.finding, verdict.reason) == (Finding.FIT, None)


@pytest.mark.parametrize(
    ("busy_s", "max_forward_s", "finding"),
    [
        (2.1, 2.0, Finding.SLOW),
        (6.0, 2.0, Finding.SLOW),
        (6.1, 2.0, Finding.LOST),
        # Three times 0.1 s is soon over on a busy machine.
        (4.9, 0.1, Finding.SLOW),
        (5.1, 0.1, Finding.LOST),
        (1000.0, None, Finding.FIT),
    ],
)
def test_a_forward_is_slow_after_its_timeout_and_hangs_after_three_times_that(busy_s, max_forward_s, finding):
    assert judge(HostHealth(busy_s=busy_s), max_forward_s=max_forward_s).finding is finding


def test_a_slow_forward_is_told_by_its_time():
    assert judge(HostHealth(busy_s=3.14)).reason == "a forward has run for 3.1 s, 2 s are due"
    assert judge(HostHealth(busy_s=7.0)).reason == "its forward hangs: it has run for 7.0 s, 2 s are due"


def test_an_unfit_host_is_lost_whatever_else_it_is():
    verdict = judge(HostHealth(busy_s=3.0, rss_bytes=1 << 40, unfit="the golden probe of l/a/0 failed"))
    assert verdict.finding is Finding.LOST
    assert verdict.reason == "it is unfit: the golden probe of l/a/0 failed"


def test_a_host_that_holds_too_much_memory_has_outgrown_it():
    verdict = judge(HostHealth(rss_bytes=101 << 20))
    assert verdict.finding is Finding.OUTGROWN
    assert verdict.reason == "its process holds 101 MiB, more than max_rss_bytes: 100 MiB"
    assert judge(HostHealth(rss_bytes=1 << 40), max_rss_bytes=None).finding is Finding.FIT


def test_new_faults_make_a_host_suspect_until_enough_pings_are_clean():
    assert findings([0, 1, 1, 1, 1]) == ["fit", "faulty", "faulty", "fit", "fit"]


def test_a_host_is_not_blamed_for_what_it_did_before_it_was_watched():
    assert findings([7, 7, 8, 8, 8]) == ["fit", "fit", "faulty", "faulty", "fit"]


def test_faults_in_many_pings_in_a_row_lose_a_host_and_clean_pings_between_them_do_not():
    assert findings([0, 1, 2, 3]) == ["fit", "faulty", "faulty", "lost"]
    assert findings([0, 1, 2, 2, 3, 4, 4, 5]) == ["fit"] + ["faulty"] * 7


def test_the_reason_of_faults_says_whose_they_are():
    watch, rules = HealthWatch(PACE), HealthRules(PACE)
    watch.answer(HostHealth(), rules)
    verdict = watch.answer(HostHealth(num_faults={"l/b/0": 2, "l/a/0": 1}), rules)
    assert verdict.reason == "outputs of the wrong kind: 1 of l/a/0, 2 of l/b/0"


def test_memory_does_not_hide_that_a_host_has_to_go_at_once():
    watch, rules = HealthWatch(PACE), HealthRules(PACE, max_rss_bytes=1)
    found = [watch.answer(HostHealth(rss_bytes=2, num_faults={"a": n}), rules).finding for n in range(4)]
    assert found == [Finding.OUTGROWN] * 3 + [Finding.LOST]


def test_a_host_that_stays_silent_is_lost_and_one_that_answers_in_between_is_not():
    watch, rules = HealthWatch(PACE), HealthRules(PACE)
    assert watch.no_answer(10.0, "no answer").finding is Finding.SILENT
    assert watch.no_answer(13.0, "no answer").finding is Finding.SILENT
    assert watch.answer(HostHealth(), rules).finding is Finding.FIT
    assert watch.no_answer(16.0, "no answer").finding is Finding.SILENT
    verdict = watch.no_answer(19.1, "no answer")
    assert (verdict.finding, verdict.reason) == (Finding.LOST, "no answer, for more than 3 s")


def test_silence_is_counted_from_the_first_lost_ping_however_long_ago_the_last_answer_was():
    silence = Silence(PACE)
    silence.end()
    # The controller was frozen itself for a minute.
    assert silence.judge(60.0, "no answer").finding is Finding.SILENT
    assert silence.judge(62.0, "no answer").finding is Finding.SILENT


def test_a_host_has_drained_when_nothing_waits_in_two_pings_in_a_row():
    drain = Drain(100.0)
    answers = [drain.is_over(HostHealth(num_waiting=n), 0.0) for n in (3, 0, 1, 0, 0)]
    assert answers == [False, False, False, False, True]


def test_a_drain_ends_at_its_deadline():
    drain = Drain(100.0)
    assert not drain.is_over(HostHealth(num_waiting=1), 99.9)
    assert drain.is_over(HostHealth(num_waiting=1), 100.0)
