"""A head that is away for a while is waited for; one that stays away means that the cluster is gone."""

from __future__ import annotations

import pytest

from moe_runtime.ray_backend.head_watch import HeadWatch, patience_s


class Head:
    """Answers or not, at times that the test sets."""

    def __init__(self):
        self.answers = True
        self.now = 0.0
        self.watch = HeadWatch(lambda: self.answers, limit_s=10.0, now=lambda: self.now)

    def look(self, *, at, answers):
        self.now, self.answers = at, answers
        return self.watch.look()


def test_a_head_that_is_back_in_time_is_forgiven_its_absence(caplog):
    head = Head()
    assert [head.look(at=at, answers=False) for at in (1.0, 5.0, 10.9)] == [None] * 3
    assert head.look(at=10.95, answers=True) is None
    assert [head.look(at=at, answers=False) for at in (11.0, 20.9)] == [None] * 2
    messages = [record.getMessage() for record in caplog.records]
    assert messages[1] == "the head of the Ray cluster is back after 10 s"
    assert [message.startswith("the head of the Ray cluster does not answer") for message in messages] == [
        True,
        False,
        True,
    ]


def test_a_head_that_stays_away_is_gone_for_good():
    head = Head()
    assert head.look(at=1.0, answers=False) is None
    reason = head.look(at=11.0, answers=False)
    assert reason is not None
    assert reason.startswith("the head of the Ray cluster has not answered for 10 s")


@pytest.mark.parametrize(("configured", "expected"), [(None, 54.0), ("100", 94.0), ("8", 4.0), ("soon", 54.0)])
def test_the_patience_ends_before_that_of_ray(monkeypatch, configured, expected):
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    if configured is not None:
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", configured)
    assert patience_s() == expected
