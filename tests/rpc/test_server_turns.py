"""Whether the server's loop does anything can be asked from outside, and is answered in time."""

from __future__ import annotations

from fakes.live_router import LiveRouter


def test_a_server_turns_until_it_is_stopped(router: LiveRouter) -> None:
    assert router.server.turns(10.0)
    router.server.drain()
    assert router.server.turns(10.0)
    router.server.stop(0.0)
    assert not router.server.turns(0.1)
