"""What one client may hold while others are active."""

from __future__ import annotations

from fakes.service import FakeClock
from moe_runtime.service.shares import ACTIVE_S, ClientShares


def test_lone_client_may_hold_everything() -> None:
    shares = ClientShares(share=0.5, clock=FakeClock())
    shares.take("a", 9)
    assert shares.may_take("a", 1, whole=10)


def test_client_that_was_refused_counts_as_active_for_a_while() -> None:
    clock = FakeClock()
    shares = ClientShares(share=0.5, clock=clock)
    shares.may_take("a", 10, whole=10)
    shares.take("a", 10)
    assert shares.may_take("b", 1, whole=10)  # whoever asked finds the whole spent, and takes nothing
    shares.take("a", -4)
    assert not shares.may_take("a", 1, whole=10)
    clock.advance(ACTIVE_S)
    assert shares.may_take("a", 1, whole=10)
    assert shares.num_active == 1


def test_client_that_holds_nothing_may_take_one_amount_however_large() -> None:
    shares = ClientShares(share=0.5, clock=FakeClock())
    shares.take("a", 1)
    assert shares.may_take("b", 9, whole=10)
    shares.take("b", 9)
    assert not shares.may_take("b", 1, whole=10)


def test_client_whose_requests_wait_stays_active_however_long_they_do() -> None:
    clock = FakeClock()
    shares = ClientShares(share=0.5, clock=clock)
    shares.may_take("patient", 1, whole=10)
    shares.take("patient", 1)
    shares.take("a", 5)
    clock.advance(10 * ACTIVE_S)
    assert not shares.may_take("a", 1, whole=10)


def test_any_number_of_names_costs_bounded_memory() -> None:
    shares = ClientShares(share=0.5, clock=FakeClock())
    shares.may_take("holds", 1, whole=10)
    shares.take("holds", 1)
    for number in range(10_000):
        shares.may_take(f"stranger-{number}", 1, whole=10)
    assert shares.num_active <= 4097
    assert shares.held("holds") == 1
