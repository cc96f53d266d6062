"""The schedule is a function of its arguments, and spares what it must."""

from __future__ import annotations

from itertools import pairwise

import pytest

from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.schedule import FIRST_AT_S, GAP_S, QUIET_END_S, FaultKind, fault_kinds, make_schedule


def test_one_seed_gives_one_schedule():
    assert make_schedule(7, 120.0) == make_schedule(7, 120.0)


def test_another_seed_gives_another_schedule():
    assert make_schedule(7, 120.0) != make_schedule(8, 120.0)


@pytest.mark.parametrize("seed", range(5))
def test_two_minutes_hold_every_kind_of_fault(seed: int):
    assert {fault.kind for fault in make_schedule(seed, 120.0)} == set(FaultKind)


@pytest.mark.parametrize("seed", range(5))
def test_faults_come_in_order_between_a_calm_start_and_a_calm_end(seed: int):
    times = [fault.at_s for fault in make_schedule(seed, 60.0)]
    assert times == sorted(times)
    assert times[0] == FIRST_AT_S
    assert times[-1] <= 60.0 - QUIET_END_S
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= GAP_S[0] - 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_routers_are_left_alone_for_ten_seconds_after_one_was_hit(seed: int):
    hits = [
        fault.at_s
        for fault in make_schedule(seed, 600.0)
        if fault.kind in (FaultKind.KILL_ROUTER, FaultKind.FREEZE_ROUTER)
    ]
    assert len(hits) > 2
    assert all(later - earlier >= 10.0 - 1e-3 for earlier, later in pairwise(hits))


def test_only_what_is_frozen_lasts():
    for fault in make_schedule(3, 300.0):
        is_frozen = fault.kind in (FaultKind.FREEZE_EXPERT, FaultKind.FREEZE_ROUTER)
        assert (fault.duration_s > 0) is is_frozen
        assert fault.duration_s <= 3.0


def test_kinds_that_are_left_out_do_not_come():
    without = {FaultKind.POISON_HANG, FaultKind.FLOOD}
    kinds = {fault.kind for fault in make_schedule(1, 300.0, without=without)}
    assert kinds == set(FaultKind) - without


def test_nothing_is_left_of_a_schedule_without_kinds_or_without_time():
    assert make_schedule(1, 60.0, without=set(FaultKind)) == ()
    assert make_schedule(1, FIRST_AT_S + QUIET_END_S - 0.1) == ()


def test_only_routers_may_be_hit():
    faults = make_schedule(1, 60.0, without=set(FaultKind) - {FaultKind.KILL_ROUTER})
    assert len(faults) > 2


def test_an_unknown_kind_is_refused_by_name():
    assert fault_kinds(["flood"]) == {FaultKind.FLOOD}
    with pytest.raises(ChaosError, match=r"expected one of kill_expert, .*found earthquake"):
        fault_kinds(["flood", "earthquake"])
