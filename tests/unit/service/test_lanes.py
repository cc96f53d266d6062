"""Messages of which a host may die travel one at a time: per host, and per request."""

from __future__ import annotations

from moe_runtime.service.lanes import SuspectLanes


def test_one_message_at_a_time_goes_to_a_host() -> None:
    lanes = SuspectLanes()
    assert lanes.enter(1, host=10, request="a")
    assert not lanes.enter(2, host=10, request="b")
    assert lanes.enter(3, host=11, request="c")
    assert lanes.leave(3) == []
    assert lanes.leave(1) == [2]


def test_one_message_of_a_request_is_on_its_way() -> None:
    lanes = SuspectLanes()
    assert lanes.enter(1, host=10, request="a")
    assert not lanes.enter(2, host=11, request="a")
    assert lanes.enter(3, host=11, request="b")
    assert lanes.leave(1) == []
    assert lanes.leave(3) == [2]


def test_a_host_that_has_not_answered_stays_closed_while_the_request_goes_on() -> None:
    lanes = SuspectLanes()
    assert lanes.enter(1, host=10, request="a")
    assert not lanes.enter(2, host=10, request="b")
    assert not lanes.enter(3, host=11, request="a")
    assert lanes.leave(1, host_is_done=False) == [3]
    assert lanes.leave(1) == [2]


def test_what_waits_no_longer_loses_its_turn() -> None:
    lanes = SuspectLanes()
    assert lanes.enter(1, host=10, request="a")
    assert not lanes.enter(2, host=10, request="b")
    assert not lanes.enter(3, host=10, request="c")
    assert lanes.leave(2) == []
    assert lanes.leave(1) == [3]


def test_a_lost_host_frees_the_request_that_it_had_and_forgets_those_that_waited_for_it() -> None:
    lanes = SuspectLanes()
    assert lanes.enter(1, host=10, request="a")
    assert not lanes.enter(2, host=10, request="b")
    assert not lanes.enter(3, host=11, request="a")
    assert lanes.host_lost(10) == [3]
    assert lanes.host_lost(10) == []
    assert lanes.enter(4, host=10, request="b")
