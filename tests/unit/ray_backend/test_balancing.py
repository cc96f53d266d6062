"""The controller steps biases by the loads of all routers, and what it has come to outlives it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_runtime.ray_backend.plan import HostPlan, ReplicaPlan
from moe_runtime.service.online_bias import BiasRule

RATE = 0.01


def rule(*experts, interval_s=2.0, min_assignments=1):
    return BiasRule(experts or ("a", "b"), RATE, interval_s, min_assignments)


def newest(spawner, index=0):
    return spawner.last(f"router-{index}").snapshots[-1]


def bias_of(spawner, index=0):
    return newest(spawner, index).table.biases["l"]


def abandon(controller):
    """Let its process be gone: nothing is closed, and its tasks no longer run."""
    for task in controller._tasks:
        task.cancel()


@pytest.fixture
async def started(make_controller, spawner, clock):
    """A controller with two routers that have said that they count from 0."""
    controller = make_controller(num_routers=2, balance={"l": rule()})
    await controller.start()
    for index in range(2):
        spawner.last(f"router-{index}").loads = {"l": {"a": 0, "b": 0}}
    await clock.advance(1.1)
    yield controller
    if not controller._ended.is_set():
        await controller.close(drain_timeout_s=0)


async def test_every_table_has_the_biases_from_the_first_on(started, spawner):
    assert newest(spawner).table.version == 1
    assert bias_of(spawner).values == (0.0, 0.0)
    assert bias_of(spawner).num_steps == 0


async def test_the_loads_of_all_routers_make_a_step_which_every_router_gets_as_the_next_version(
    started, spawner, clock
):
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 0}}
    spawner.last("router-1").loads = {"l": {"a": 0, "b": 10}}
    await clock.advance(2.0)
    for index in range(2):
        assert newest(spawner, index).table.version == 2
        assert bias_of(spawner, index).values == pytest.approx((-RATE, RATE))
        assert bias_of(spawner, index).load_ratio == pytest.approx(1.5)
        assert bias_of(spawner, index).num_assignments == 40
    assert newest(spawner).table.replicas == spawner.last("router-0").snapshots[0].table.replicas
    assert (await started.describe())["balance"]["l"]["num_steps"] == 1


async def test_every_step_is_a_version(started, spawner, clock):
    for number in range(1, 6):
        spawner.last("router-0").loads = {"l": {"a": 10 * number, "b": 0}}
        await clock.advance(2.0)
    versions = [snapshot.table.version for snapshot in spawner.last("router-0").snapshots]
    steps = [snapshot.table.biases["l"].num_steps for snapshot in spawner.last("router-0").snapshots]
    assert versions == [1, 2, 3, 4, 5, 6]
    assert steps == [0, 1, 2, 3, 4, 5]


async def test_without_load_no_table_is_published(started, spawner, clock):
    await clock.advance(60.0)
    assert newest(spawner).table.version == 1


async def test_what_was_counted_since_the_last_step_is_described(started, spawner, clock):
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(0.9)
    balance = (await started.describe())["balance"]["l"]
    assert (balance["num_steps"], balance["num_assignments"]) == (0, 0)
    assert (balance["num_assignments_since"], balance["load_ratio_since"]) == (40, 1.5)


async def test_a_router_that_does_not_answer_holds_up_nobody_and_is_counted_when_it_does(started, spawner, clock):
    silent, other = spawner.last("router-0"), spawner.last("router-1")
    silent.tells_loads = False
    silent.loads, other.loads = {"l": {"a": 50, "b": 0}}, {"l": {"a": 0, "b": 8}}
    await clock.advance(4.5)
    assert bias_of(spawner, 1).num_assignments == 8
    silent.tells_loads = True
    await clock.advance(4.0)
    assert bias_of(spawner, 1).num_assignments == 58


async def test_a_router_that_restarts_is_counted_from_zero_and_what_it_was_asked_before_only_once(
    started, spawner, clock
):
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(2.0)
    spawner.last("router-0").die()
    await clock.advance(1.0)
    successor = spawner.last("router-0")
    assert len(spawner.spawned["router-0"]) == 2
    assert newest(spawner).table.biases["l"].num_steps == 1
    successor.loads = {"l": {"a": 2, "b": 1}}
    await clock.advance(4.0)
    assert bias_of(spawner).num_assignments == 43
    await clock.advance(60.0)
    assert bias_of(spawner).num_assignments == 43


async def test_a_restarted_controller_goes_on_from_the_newest_bias_and_counts_nothing_again(
    started, make_controller, spawner, clock
):
    spawner.last("router-1").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(2.0)
    before = bias_of(spawner)
    version = newest(spawner).table.version
    abandon(started)
    successor = make_controller(num_routers=2, balance={"l": rule()})
    await successor.resume()
    assert newest(spawner).table.version > version
    assert bias_of(spawner) == before
    await clock.advance(60.0)
    assert bias_of(spawner) == before
    spawner.last("router-1").loads = {"l": {"a": 30, "b": 12}}
    await clock.advance(4.0)
    assert bias_of(spawner).num_steps == before.num_steps + 1
    assert bias_of(spawner).num_assignments == 42
    await successor.close(drain_timeout_s=0)


async def test_the_newest_of_all_kept_biases_is_adopted(started, make_controller, spawner, clock):
    spawner.last("router-0").answers_snapshots = False
    spawner.last("router-1").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(4.0)
    assert (bias_of(spawner, 0).num_steps, bias_of(spawner, 1).num_steps) == (0, 1)
    abandon(started)
    spawner.last("router-0").answers_snapshots = True
    successor = make_controller(num_routers=2, balance={"l": rule()})
    await successor.resume()
    assert bias_of(spawner, 0).num_steps == bias_of(spawner, 1).num_steps == 1
    await successor.close(drain_timeout_s=0)


async def test_an_upgrade_of_the_experts_carries_biases_by_their_names(started, spawner, clock):
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(2.0)
    plan = started.plan
    new = HostPlan("new", (ReplicaPlan("l", 0, "l/new/0"),), plan.hosts[0].demand, b"")
    moved = replace(plan.hosts[1], replicas=(ReplicaPlan("l", 1, "l/b/0"),))
    await started.upgrade(replace(plan, hosts=(new, moved), balance={"l": rule("new", "b")}))
    first = next(s for s in spawner.last("router-0").snapshots if s.plan.balance["l"].experts == ("new", "b"))
    # What is published with the new experts is theirs at once: 0 and RATE, less their mean.
    assert first.table.biases["l"].values == pytest.approx((-RATE / 2, RATE / 2))
    assert bias_of(spawner).num_steps == 1


async def test_an_upgrade_that_ends_balancing_leaves_the_gate_its_say(started, spawner, clock):
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(2.0)
    await started.upgrade(replace(started.plan, balance={}))
    assert newest(spawner).table.biases == {}
    await started.upgrade(replace(started.plan, balance={"l": rule()}))
    assert bias_of(spawner).values == (0.0, 0.0)


async def test_another_rate_counts_from_the_next_step_on(started, spawner, clock):
    await started.upgrade(replace(started.plan, balance={"l": replace(rule(), rate=0.5)}))
    spawner.last("router-0").loads = {"l": {"a": 30, "b": 10}}
    await clock.advance(4.0)
    assert bias_of(spawner).values == pytest.approx((-0.5, 0.5))


async def test_routers_that_an_upgrade_brings_are_counted_too(started, spawner, clock):
    plan = started.plan
    await started.upgrade(replace(plan, routers=replace(plan.routers, count=1)))
    await started.upgrade(replace(plan, routers=replace(plan.routers, count=3)))
    for index in (1, 2):
        spawner.last(f"router-{index}").loads = {"l": {"a": 0, "b": 0}}
    await clock.advance(1.1)
    for index in range(3):
        spawner.last(f"router-{index}").loads = {"l": {"a": 10, "b": 0}}
    await clock.advance(3.0)
    assert bias_of(spawner, 2).num_assignments == 30
