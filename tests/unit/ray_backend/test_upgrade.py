"""Upgrades with actors that live, hang and die when tests say so: whatever fails, one of both plans serves."""

from __future__ import annotations

import asyncio

import pytest

from moe_runtime.errors import ConfigError, PlacementError, StartError
from moe_runtime.ray_backend.controller import Controller
from moe_runtime.ray_backend.plan import Demand, HostPlan, ReplicaPlan, RoutersPlan, RuntimePlan

OLD = {"a": "1", "b": "1"}


def plan_of(hosts=OLD, *, num_routers=1, routers="r1", address="127.0.0.1:0", **changes):
    """Hosts by id, with their revision, each with the expert of its place."""
    host_plans = tuple(
        HostPlan(name, (ReplicaPlan("l", i, f"l/{name}/0"),), Demand(), b"", revision=revision)
        for i, (name, revision) in enumerate(hosts.items())
    )
    fixed = {"router.address": address}
    router_plan = RoutersPlan(num_routers, address, b"", revision=routers, fixed=fixed, let_go_s=30.0)
    return RuntimePlan("test", host_plans, router_plan, **{"lease_s": None, **changes})


@pytest.fixture
async def controller(spawner, clock):
    made = Controller(plan_of(), spawner=spawner, clock=clock)
    await made.start()
    yield made
    await made.close(drain_timeout_s=0)


def newest(spawner, router="router-0"):
    return spawner.last(router).snapshots[-1]


def endpoints(snapshot):
    """Which process serves each expert."""
    return {key: [r.endpoint.incarnation for r in replicas] for key, replicas in snapshot.table.replicas.items()}


def pids(spawner, *names):
    return {("l", i): [spawner.last(name).pid] for i, name in enumerate(names)}


def abandon(controller):
    """The process is gone: nothing was closed, and its tasks no longer run."""
    for task in controller._tasks:
        task.cancel()


async def test_what_has_changed_starts_beside_the_old_and_what_has_not_is_left_alone(controller, spawner):
    outcome = await controller.upgrade(plan_of({"a": "1", "b": "2", "c": "1"}))
    assert (outcome.kept, outcome.replaced, outcome.added, outcome.removed) == (("a",), ("b",), ("c",), ())
    assert spawner.living() == {"a@1", "b@2", "c@1", "router-0"}
    assert len(spawner.spawned["a@1"]) == 1
    assert endpoints(newest(spawner)) == pids(spawner, "a@1", "b@2", "c@1")
    assert newest(spawner).plan == plan_of({"a": "1", "b": "2", "c": "1"})
    assert spawner.log == ["stop b@1", "kill b@1"]


async def test_an_old_host_lives_until_no_router_needs_it(controller, spawner, clock):
    spawner.last("router-0").holds = newest(spawner).table.version
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"})))
    await clock.advance(20.0)
    assert endpoints(newest(spawner)) == pids(spawner, "a@1", "b@2")
    assert spawner.living() >= {"b@1", "b@2"}
    assert (await controller.describe())["upgrade"]["step"] == "ending what is old, after its last request"
    spawner.last("router-0").holds = None
    await clock.advance(1.0)
    assert (await upgrading).replaced == ("b",)
    assert "b@1" not in spawner.living()
    assert (await controller.describe())["upgrade"] is None


async def test_a_router_that_never_lets_go_is_restarted(controller, spawner, clock):
    first = spawner.last("router-0")
    first.holds = newest(spawner).table.version
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"}, routers="r2")))
    await clock.advance(32.0)
    await upgrading
    assert first.death.done()
    assert spawner.living() == {"a@1", "b@2", "router-0"}
    assert spawner.last("router-0").served == "r2"


@pytest.mark.parametrize("failure", ["host raises", "router refuses"])
async def test_what_cannot_start_ends_everything_new_and_leaves_the_old(controller, spawner, behave, failure):
    before = endpoints(newest(spawner))
    if failure == "host raises":
        spawner.behaviours["b@2"].append(behave(error="PlugInError: boom"))
    else:
        spawner.last("router-0").refuses_to_prepare = "PlugInError: boom"
    asked = plan_of({"a": "1", "b": "2", "c": "1"}, routers="r2", num_routers=2)
    with pytest.raises(StartError, match="PlugInError: boom"):
        await controller.upgrade(asked)
    assert spawner.living() == {"a@1", "b@1", "router-0"}
    assert (endpoints(newest(spawner)), newest(spawner).plan) == (before, plan_of())
    assert (await controller.describe())["upgrade"] is None
    spawner.last("router-0").refuses_to_prepare = None
    assert (await controller.upgrade(asked)).added == ("c",)
    assert spawner.living() == {"a@1", "b@2", "c@1", "router-0", "router-1"}


async def test_without_room_for_what_is_new_the_error_names_it_and_the_old_serves(controller, spawner, behave, clock):
    spawner.behaviours["b@2"].append(behave(is_placed=False))
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"}, start_timeout_s=5.0)))
    await clock.advance(6.0)
    with pytest.raises(PlacementError, match="host b: found no place within 5 s"):
        await upgrading
    assert spawner.living() == {"a@1", "b@1", "router-0"}


async def test_routers_are_prepared_before_the_table_changes(controller, spawner, clock, behave):
    spawner.behaviours["b@2"].append(behave(is_placed=False))
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"}, routers="r2")))
    await clock.advance(1.0)
    assert spawner.last("router-0").prepared == []
    assert [host["host_id"] for host in (await controller.describe())["upgrade"]["new"]] == ["b"]
    upgrading.cancel()
    await controller.close(drain_timeout_s=0)
    assert spawner.living() == set()


async def test_experts_get_other_places_without_a_new_process(controller, spawner):
    await controller.upgrade(plan_of({"new": "1", "b": "1", "a": "1"}, routers="r2"))
    assert endpoints(newest(spawner)) == pids(spawner, "new@1", "b@1", "a@1")
    assert len(spawner.spawned["a@1"]) == len(spawner.spawned["b@1"]) == 1
    assert spawner.last("router-0").prepared == ["r2"]


async def test_a_host_that_dies_later_comes_back_by_the_new_plan(controller, spawner, clock):
    await controller.upgrade(plan_of({"b": "2", "a": "1"}))
    spawner.last("a@1").die()
    spawner.last("b@2").die()
    await clock.advance(1.0)
    assert endpoints(newest(spawner)) == pids(spawner, "b@2", "a@1")
    assert len(spawner.spawned["b@1"]) == 1


async def test_every_host_admits_a_new_router_before_it_gets_the_table(controller, spawner):
    await controller.upgrade(plan_of({"a": "1", "b": "2"}, num_routers=2))
    key = spawner.last("router-1").public_key
    told = spawner.introductions.index(f"router-1 gets version {newest(spawner, 'router-1').table.version}")
    for host in ("a@1", "b@2"):
        admissions = [i for i, each in enumerate(spawner.introductions) if each.startswith(host) and key in each]
        assert min(admissions) < told
    assert controller.addresses() == ["127.0.0.1:7777", "127.0.0.1:7777"]


async def test_a_router_that_goes_is_drained_before_old_hosts_end_and_then_forgotten(spawner, clock):
    controller = Controller(plan_of(num_routers=2), spawner=spawner, clock=clock)
    await controller.start()
    leaving = spawner.last("router-1")
    await controller.upgrade(plan_of({"a": "1", "b": "2"}))
    assert spawner.log == ["drain router-1", "stop router-1", "kill router-1", "stop b@1", "kill b@1"]
    await clock.advance(0.1)
    assert spawner.last("a@1").admitted == {spawner.last("router-0").public_key}
    assert leaving.public_key not in newest(spawner).public_keys.values()
    await controller.close(drain_timeout_s=0)


async def test_the_same_plan_again_does_nothing(controller, spawner):
    version = newest(spawner).table.version
    outcome = await controller.upgrade(plan_of())
    assert outcome.is_nothing
    assert outcome.kept == ("a", "b")
    assert newest(spawner).table.version == version


async def test_upgrades_wait_for_each_other(controller, spawner):
    plans = [plan_of({"a": "1", "b": str(revision)}) for revision in range(2, 6)]
    outcomes = await asyncio.gather(*(controller.upgrade(plan) for plan in plans))
    assert [outcome.replaced for outcome in outcomes] == [("b",)] * 4
    assert spawner.living() == {"a@1", "b@5", "router-0"}


async def test_what_cannot_change_in_place_is_refused_before_anything_starts(controller, spawner):
    with pytest.raises(ConfigError) as caught:
        await controller.upgrade(plan_of({"a": "2"}, address="127.0.0.1:9"))
    assert str(caught.value) == (
        "router.address: expected 127.0.0.1:0 as it runs, found 127.0.0.1:9\n"
        "this cannot change while the runtime serves; `moe-runtime teardown test` and then `moe-runtime deploy` "
        "brings the new configuration"
    )
    assert spawner.living() == {"a@1", "b@1", "router-0"}


async def test_a_controller_that_dies_before_the_change_leaves_the_old_plan_and_its_successor_ends_the_rest(
    controller, spawner, clock, behave
):
    spawner.behaviours["b@2"].append(behave(is_placed=False))
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"})))
    await clock.advance(1.0)
    abandon(controller)
    upgrading.cancel()
    # Its process would not have ended anything.
    spawner.spawn_host(plan_of({"c": "1"}).hosts[0], node_id=None)
    second = Controller(plan_of(), spawner=spawner, clock=clock)
    await second.resume()
    assert (await second.upgrade(plan_of({"a": "1", "b": "3"}))).replaced == ("b",)
    assert spawner.living() == {"a@1", "b@3", "router-0"}
    await second.close(drain_timeout_s=0)


async def test_a_controller_that_dies_after_the_change_is_succeeded_by_one_that_has_the_new_plan(
    controller, spawner, clock
):
    spawner.last("router-0").holds = newest(spawner).table.version
    asked = plan_of({"a": "1", "b": "2"}, routers="r2")
    upgrading = asyncio.ensure_future(controller.upgrade(asked))
    await clock.advance(1.0)
    abandon(controller)
    upgrading.cancel()
    second = Controller(plan_of(), spawner=spawner, clock=clock)
    await second.resume()
    await clock.advance(1.0)
    assert endpoints(newest(spawner)) == pids(spawner, "a@1", "b@2")
    assert "b@1" in spawner.living()
    spawner.last("router-0").holds = None
    await clock.advance(2.0)
    assert spawner.living() == {"a@1", "b@2", "router-0"}
    assert (await second.upgrade(asked)).is_nothing
    await second.close(drain_timeout_s=0)


async def test_threads_auto_counts_only_what_will_be_there(controller, spawner):
    assert (spawner.last("a@1").starts, spawner.last("b@1").starts) == ([4], [4])
    await controller.upgrade(plan_of({"a": "1", "b": "2"}))
    assert spawner.last("b@2").starts == [4]


async def test_closing_during_an_upgrade_ends_the_old_and_the_new(controller, spawner, clock):
    spawner.last("router-0").holds = newest(spawner).table.version
    upgrading = asyncio.ensure_future(controller.upgrade(plan_of({"a": "1", "b": "2"})))
    await clock.advance(1.0)
    await controller.close(drain_timeout_s=0)
    with pytest.raises(StartError, match="ended before its upgrade was"):
        await upgrading
    assert spawner.living() == set()
