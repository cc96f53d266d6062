"""Controllers over a clock that tests move by hand, and actors that live, hang and die when tests say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fakes.actors import Behaviour, FakeClock, FakeSpawner
from moe_runtime.ray_backend.controller import Controller
from moe_runtime.ray_backend.plan import Demand, HostPlan, ReplicaPlan, RoutersPlan, RuntimePlan


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def spawner() -> FakeSpawner:
    return FakeSpawner()


def _plan(**changes: Any) -> RuntimePlan:
    hosts = tuple(
        HostPlan(name, (ReplicaPlan("l", i, f"l/{name}/0"),), Demand(num_gpus=1), b"")
        for i, name in enumerate(("a", "b"))
    )
    num_routers = changes.pop("num_routers", 1)
    routers = RoutersPlan(num_routers, changes.pop("address", "127.0.0.1:0"), b"")
    return RuntimePlan("test", hosts, routers, **{"lease_s": None, **changes})


@pytest.fixture
def make_controller(clock: FakeClock, spawner: FakeSpawner) -> Callable[..., Controller]:
    """Makes a controller of two hosts, ``a`` and ``b``, and one router; arguments change its plan."""

    def make(**changes: Any) -> Controller:
        return Controller(_plan(**changes), spawner=spawner, clock=clock)

    return make


@pytest.fixture
def behave() -> Callable[..., Behaviour]:
    """Makes the behaviour of an actor."""
    return Behaviour
