"""Hosts let a router in before it learns where they are."""

from __future__ import annotations

import asyncio

import pytest


def states(snapshot):
    return {r.replica_id: str(r.state) for replicas in snapshot.table.replicas.values() for r in replicas}


def newest(spawner):
    return spawner.last("router-0").snapshots[-1]


@pytest.fixture
async def controller(make_controller):
    """A controller that has started two hosts and two routers."""
    controller = make_controller(num_routers=2)
    await controller.start()
    yield controller
    await controller.close(drain_timeout_s=0)


def keys_of(spawner, *routers):
    return {spawner.last(router).public_key for router in routers}


async def test_every_host_admits_every_router_before_any_router_gets_the_table(controller, spawner):
    keys = keys_of(spawner, "router-0", "router-1")
    assert spawner.last("a").admitted == spawner.last("b").admitted == keys
    both = ", ".join(sorted(keys))
    assert sorted(spawner.introductions[:2]) == [f"a admits {both}", f"b admits {both}"]
    assert sorted(spawner.introductions[2:]) == ["router-0 gets version 1", "router-1 gets version 1"]
    assert set(newest(spawner).public_keys.values()) == keys


async def test_a_restarted_router_is_admitted_with_its_new_key_before_it_gets_the_table(controller, spawner, clock):
    old = spawner.last("router-0")
    spawner.introductions.clear()
    old.die()
    await clock.advance(1.0)
    new = spawner.last("router-0")
    assert new.public_key != old.public_key
    keys = keys_of(spawner, "router-0", "router-1")
    assert spawner.last("a").admitted == spawner.last("b").admitted == keys
    both = ", ".join(sorted(keys))
    assert sorted(spawner.introductions[:2]) == [f"a admits {both}", f"b admits {both}"]
    assert new.snapshots[0].is_for(new.public_key)
    assert not new.snapshots[0].is_for(old.public_key)


async def test_a_restarted_host_admits_the_routers_before_a_table_calls_it_ready(controller, spawner, clock):
    spawner.introductions.clear()
    spawner.last("a").die()
    await clock.advance(1.0)
    assert states(newest(spawner))["l/a/0"] == "ready"
    both = ", ".join(sorted(keys_of(spawner, "router-0", "router-1")))
    admission = spawner.introductions.index(f"a admits {both}")
    told = [i for i, event in enumerate(spawner.introductions) if event == f"router-0 gets version {ready(spawner)}"]
    assert admission < told[0]
    assert not any(event.startswith("b admits") for event in spawner.introductions)


def ready(spawner):
    """The first version whose table has the restarted host ready."""
    incarnation = spawner.last("a").pid
    tables = [snapshot.table for snapshot in spawner.last("router-0").snapshots]
    return next(
        table.version
        for table in tables
        for replica in table.replicas["l", 0]
        if replica.endpoint.incarnation == incarnation and str(replica.state) == "ready"
    )


async def test_a_host_that_does_not_admit_a_router_is_suspect_until_it_does(controller, spawner, clock):
    spawner.last("a").answers_admissions = False
    spawner.last("router-0").die()
    await clock.advance(2.5)
    assert states(newest(spawner)) == {"l/a/0": "suspect", "l/b/0": "ready"}
    description = (await controller.describe())["hosts"][0]
    assert description["reason"] == "it did not admit the routers: nothing within 2 s"
    spawner.last("a").answers_admissions = True
    await clock.advance(4.0)
    assert states(newest(spawner)) == {"l/a/0": "ready", "l/b/0": "ready"}
    assert spawner.last("a").admitted == keys_of(spawner, "router-0", "router-1")
    assert len(spawner.spawned["a"]) == 1


async def test_a_restarted_controller_learns_the_keys_of_routers_that_run(make_controller, spawner):
    first = make_controller()
    await first.start()
    for task in first._tasks:
        task.cancel()
    spawner.introductions.clear()
    second = make_controller()
    await second.resume()
    key = spawner.last("router-0").public_key
    assert sorted(spawner.introductions) == [f"a admits {key}", f"b admits {key}", "router-0 gets version 2"]
    await second.close(drain_timeout_s=0)


async def test_a_restarted_controller_keeps_the_key_of_a_router_that_does_not_answer(make_controller, spawner, clock):
    first = make_controller()
    await first.start()
    for task in first._tasks:
        task.cancel()
    router = spawner.last("router-0")
    router.behaviour.is_placed = False
    second = make_controller()
    resuming = asyncio.ensure_future(second.resume())
    await clock.advance(11.0)
    await resuming
    assert spawner.last("a").admitted == {router.public_key}
    assert newest(spawner).public_keys == {0: router.public_key}
    await second.close(drain_timeout_s=0)


async def test_routers_without_keys_need_no_admission(make_controller, spawner, behave):
    spawner.behaviours["router-0"].append(behave(has_key=False))
    controller = make_controller()
    await controller.start()
    assert spawner.introductions == ["router-0 gets version 1"]
    assert newest(spawner).public_keys == {}
    assert newest(spawner).is_for(None)
    await controller.close(drain_timeout_s=0)
