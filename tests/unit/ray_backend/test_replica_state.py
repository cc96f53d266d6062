from __future__ import annotations

import pytest

from moe_runtime.errors import InternalError
from moe_runtime.ray_backend.replica_state import Backoff, ReplicaLife
from moe_runtime.service.routing_table import ReplicaState

BACKOFF = Backoff(first_s=1.0, factor=2.0, max_s=5.0, stable_s=100.0)


def fail_again(life, now):
    return life.start_again(life.retry_at).go_out(now, "again", BACKOFF)


def test_a_replica_starts_serves_is_suspected_and_recovers():
    life = ReplicaLife.begin(0.0)
    assert life.state is ReplicaState.STARTING
    life = life.become_ready(1.0).become_suspect(2.0, "no answer")
    assert (life.state, life.since, life.reason) == (ReplicaState.SUSPECT, 2.0, "no answer")
    life = life.become_ready(3.0)
    assert (life.state, life.reason, life.ready_since) == (ReplicaState.READY, None, 1.0)


def test_every_failure_in_a_row_doubles_the_time_out_up_to_its_maximum():
    life = ReplicaLife.begin(0.0).go_out(0.0, "first", BACKOFF)
    delays = [life.retry_at - life.since]
    for _ in range(4):
        life = fail_again(life, life.retry_at)
        delays.append(life.retry_at - life.since)
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_replica_that_served_long_enough_has_its_failures_forgiven():
    life = fail_again(ReplicaLife.begin(0.0).go_out(0.0, "first", BACKOFF), 1.0)
    life = life.start_again(3.0).become_ready(3.0)
    assert life.go_out(50.0, "early", BACKOFF).num_failures == 3
    assert life.go_out(103.0, "late", BACKOFF).num_failures == 1


def test_time_spent_suspect_does_not_restart_the_stable_time():
    life = ReplicaLife.begin(0.0).go_out(0.0, "first", BACKOFF).start_again(1.0).become_ready(1.0)
    life = life.become_suspect(60.0, "slow").become_ready(61.0)
    assert life.go_out(101.0, "late", BACKOFF).num_failures == 1


def test_a_replica_never_starts_before_its_time():
    life = ReplicaLife.begin(0.0).go_out(10.0, "first", BACKOFF)
    with pytest.raises(InternalError, match=r"may start again at 11\.0, it is 10\.5"):
        life.start_again(10.5)
    assert life.start_again(11.0).state is ReplicaState.STARTING


@pytest.mark.parametrize(
    ("life", "step"),
    [
        (ReplicaLife.begin(0.0), lambda life: life.become_suspect(1.0, "x")),
        (ReplicaLife.begin(0.0), lambda life: life.start_again(1.0)),
        (ReplicaLife.begin(0.0).become_ready(0.0), lambda life: life.become_ready(1.0)),
        (ReplicaLife.begin(0.0).go_out(0.0, "x", BACKOFF), lambda life: life.become_ready(9.0)),
        (ReplicaLife.begin(0.0).go_out(0.0, "x", BACKOFF), lambda life: life.go_out(9.0, "y", BACKOFF)),
    ],
)
def test_a_step_that_leads_nowhere_is_refused(life, step):
    with pytest.raises(InternalError, match="never followed by"):
        step(life)


def test_a_thousand_failures_still_give_a_finite_time():
    assert BACKOFF.delay_s(5000) == 5.0
