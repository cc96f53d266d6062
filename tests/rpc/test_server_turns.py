"""Whether the server's loop does anything can be asked from outside."""

from __future__ import annotations

from fakes.live_router import LiveRouter


def test_a_server_takes_turns_until_it_is_stopped(router: LiveRouter) -> None:
    assert router.server.next_turn().result(20.0) is None
    router.server.drain()
    assert router.server.next_turn().result(20.0) is None
    router.server.stop(0.0)
    assert not router.server.next_turn().done()
