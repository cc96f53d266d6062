"""Rolling restarts with actors that live, hang and die when tests say so."""

from __future__ import annotations

import asyncio

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.changes import Restarted
from moe_runtime.ray_backend.controller import Controller
from moe_runtime.ray_backend.plan import Demand, HostPlan, ReplicaPlan, RoutersPlan, RuntimePlan


def plan_of(*hosts, num_routers=2):
    host_plans = tuple(
        HostPlan(name, (ReplicaPlan("l", i, f"l/{name}/0"),), Demand(), b"", revision=f"{name}1")
        for i, name in enumerate(hosts)
    )
    routers = RoutersPlan(num_routers, "127.0.0.1:0", b"", revision="r1", let_go_s=30.0)
    return RuntimePlan("test", host_plans, routers, lease_s=None)


@pytest.fixture
async def controller(spawner, clock):
    made = Controller(plan_of("a", "b"), spawner=spawner, clock=clock)
    await made.start()
    yield made
    await made.close(drain_timeout_s=0)


def endpoints(spawner, router="router-0"):
    table = spawner.last(router).snapshots[-1].table
    return {key: [each.endpoint.incarnation for each in found] for key, found in table.replicas.items()}


async def test_every_host_gets_a_successor_beside_it_one_after_the_other(controller, spawner):
    terms = controller.restart_terms()
    assert terms.generation == 1
    outcome = await controller.restart(generation=1, routers=False)
    assert outcome == Restarted(("a", "b"), 0)
    assert spawner.living() == {"a@a1+1", "b@b1+1", "router-0", "router-1"}
    assert spawner.log == ["stop a@a1", "kill a@a1", "stop b@b1", "kill b@b1"]
    pids = {("l", i): [spawner.last(name).pid] for i, name in enumerate(("a@a1+1", "b@b1+1"))}
    assert endpoints(spawner) == endpoints(spawner, "router-1") == pids


async def test_the_next_restart_is_of_the_next_generation_and_an_old_one_has_nothing_left_to_do(controller, spawner):
    await controller.restart(generation=1, routers=False)
    assert controller.restart_terms().generation == 2
    assert await controller.restart(generation=1, routers=False) == Restarted((), 0)
    assert (await controller.restart(generation=2, routers=False)).hosts == ("a", "b")
    assert spawner.living() == {"a@a1+2", "b@b1+2", "router-0", "router-1"}


async def test_a_restart_that_failed_half_way_goes_on_where_it_was(controller, spawner, behave):
    spawner.behaviours["b@b1+1"].append(behave(error="boom"))
    with pytest.raises(StartError, match="boom"):
        await controller.restart(generation=1, routers=True)
    assert spawner.living() == {"a@a1+1", "b@b1", "router-0", "router-1"}
    assert "drain router-0" not in spawner.log
    assert (await controller.restart(generation=1, routers=False)).hosts == ("b",)


async def test_routers_are_drained_and_come_back_at_their_addresses_one_after_the_other(controller, spawner, clock):
    before = [spawner.last(f"router-{index}").pid for index in range(2)]
    restarting = asyncio.ensure_future(controller.restart(generation=0, routers=True))
    await clock.advance(0.1)
    assert spawner.log == ["drain router-0", "stop router-0", "restart router-0"]
    # Clients are given time to find out that the first is back.
    await clock.advance(1.5)
    assert "drain router-1" not in spawner.log
    await clock.advance(2.5)
    assert await restarting == Restarted((), 2)
    assert spawner.log[3:] == ["drain router-1", "stop router-1", "restart router-1"]
    assert [spawner.last(f"router-{index}").starts for index in range(2)] == [["127.0.0.1:7777"]] * 2
    assert before != [spawner.last(f"router-{index}").pid for index in range(2)]
    assert endpoints(spawner) == endpoints(spawner, "router-1")
    description = await controller.describe()
    assert [router["state"] for router in description["routers"]] == ["ready", "ready"]
    spawner.last("router-0").die()
    await clock.advance(3.0)
    assert (await controller.describe())["routers"][0]["state"] == "ready"


async def test_the_second_router_stays_until_the_first_routes_again(controller, spawner, clock, behave):
    spawner.behaviours["router-0"].append(behave(is_placed=False))
    restarting = asyncio.ensure_future(controller.restart(generation=0, routers=True))
    await clock.advance(20.0)
    assert "drain router-1" not in spawner.log
    restarting.cancel()


async def test_an_upgrade_after_a_restart_leaves_alone_what_has_not_changed(controller, spawner):
    await controller.restart(generation=1, routers=False)
    outcome = await controller.upgrade(plan_of("a", "b", "c"))
    assert (outcome.kept, outcome.added, outcome.replaced) == (("a", "b"), ("c",), ())
    assert spawner.living() == {"a@a1+1", "b@b1+1", "c@c1", "router-0", "router-1"}
    assert (await controller.upgrade(plan_of("a", "b", "c"))).is_nothing


async def test_a_controller_that_dies_during_a_restart_is_succeeded_by_one_that_can_finish_it(
    controller, spawner, clock, behave
):
    spawner.behaviours["b@b1+1"].append(behave(is_placed=False))
    restarting = asyncio.ensure_future(controller.restart(generation=1, routers=False))
    await clock.advance(1.0)
    for task in controller._tasks:
        task.cancel()
    restarting.cancel()
    second = Controller(plan_of("a", "b"), spawner=spawner, clock=clock)
    await second.resume()
    await clock.advance(1.0)
    assert (await second.restart(generation=1, routers=False)).hosts == ("b",)
    assert spawner.living() == {"a@a1+1", "b@b1+1", "router-0", "router-1"}
    await second.close(drain_timeout_s=0)
