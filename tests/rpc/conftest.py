from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.live_router import LiveRouter, StartRouter
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.rpc.client import MoEClient


@pytest.fixture
def start_router() -> Iterator[StartRouter]:
    """Starts routers with limits of the test's choice, and stops them after it."""
    started: list[LiveRouter] = []

    def start(
        *,
        address: str = "127.0.0.1:0",
        limits: LimitsConfig | None = None,
        router: RouterConfig | None = None,
        security: SecurityConfig | None = None,
    ) -> LiveRouter:
        live = LiveRouter(
            address=address, limits=limits or LimitsConfig(), router=router or RouterConfig(), security=security
        )
        started.append(live)
        return live.start()

    yield start
    for live in started:
        live.stop()


@pytest.fixture(scope="module")
def router() -> Iterator[LiveRouter]:
    """A router that the tests of a module share."""
    live = LiveRouter(limits=LimitsConfig(), router=RouterConfig()).start()
    yield live
    live.stop()


@pytest.fixture
def client(router: LiveRouter) -> Iterator[MoEClient]:
    with MoEClient(router.address) as client:
        yield client
